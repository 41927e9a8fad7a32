//! A machine's network card: a TUN device in the network namespace of the calling thread.
//!
//! Whoever holds the descriptor sees every packet that the machine sends, and decides what it
//! receives. The device goes with its descriptor.

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::mem::zeroed;
use std::net::{Ipv4Addr, UdpSocket};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;

/// Its name within the machine.
const NAME: &CStr = c"mobula0";

/// All machines of a run are neighbours.
const NETMASK: Ipv4Addr = Ipv4Addr::new(255, 255, 255, 0);

/// Makes the device, gives it `address`, and brings it and the loopback up.
pub(super) fn open(address: Ipv4Addr) -> io::Result<File> {
    let device = File::options()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open("/dev/net/tun")?;
    let mut request = request_for(NAME);
    // Bare IP packets, without a header of the kernel's in front.
    request.ifr_ifru.ifru_flags = (libc::IFF_TUN | libc::IFF_NO_PI) as i16;
    control(device.as_raw_fd(), libc::TUNSETIFF, &mut request)?;

    // Any socket of this namespace will do to ask with.
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
    let socket = socket.as_raw_fd();
    for (what, value) in [
        (libc::SIOCSIFADDR, address),
        (libc::SIOCSIFNETMASK, NETMASK),
    ] {
        let mut request = request_for(NAME);
        request.ifr_ifru.ifru_addr = socket_address(value);
        control(socket, what, &mut request)?;
    }
    for name in [c"lo", NAME] {
        let mut request = request_for(name);
        control(socket, libc::SIOCGIFFLAGS, &mut request)?;
        // SAFETY: the kernel has just filled in this member.
        let flags = unsafe { request.ifr_ifru.ifru_flags };
        request.ifr_ifru.ifru_flags = flags | (libc::IFF_UP | libc::IFF_RUNNING) as i16;
        control(socket, libc::SIOCSIFFLAGS, &mut request)?;
    }
    Ok(device)
}

fn request_for(name: &CStr) -> libc::ifreq {
    // SAFETY: zeroes are a valid request: an empty name and no value.
    let mut request: libc::ifreq = unsafe { zeroed() };
    for (place, byte) in request.ifr_name.iter_mut().zip(name.to_bytes()) {
        *place = *byte as libc::c_char;
    }
    request
}

fn socket_address(address: Ipv4Addr) -> libc::sockaddr {
    // SAFETY: both are plain data of the same size, and the family says which is meant.
    unsafe {
        let mut internet: libc::sockaddr_in = zeroed();
        internet.sin_family = libc::AF_INET as libc::sa_family_t;
        internet.sin_addr.s_addr = u32::from(address).to_be();
        std::mem::transmute::<libc::sockaddr_in, libc::sockaddr>(internet)
    }
}

fn control(descriptor: RawFd, what: libc::Ioctl, request: &mut libc::ifreq) -> io::Result<()> {
    let request: *mut libc::ifreq = request;
    // SAFETY: each of these requests reads and writes one `ifreq`, which lives until it returns.
    match unsafe { libc::ioctl(descriptor, what, request) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}
