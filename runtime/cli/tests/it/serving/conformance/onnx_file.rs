//! ONNX files whose outputs are their inputs, as the models of the probes are.
//!
//! The few messages that this takes are written by hand, so that no other tool has to be there; the numbers of their fields are
//! those of `onnx.proto3`.

use mobula_actors::serving::oip::Datatype;

/// The newest version of the file format that [`OPSET`] came with.
const IR: u64 = 8;

const OPSET: u64 = 17;

/// An input, and the output that is like it.
pub(super) struct Copied {
    pub(super) datatype: Datatype,
    /// The dimensions of a row. Before them comes that of the batch, which is open.
    pub(super) row: &'static [u64],
}

/// A file with the inputs `INPUT0`, `INPUT1` and so on, and as many outputs that are like them.
pub(super) fn copying(tensors: &[Copied]) -> Vec<u8> {
    let mut graph = bytes(2, b"copies");
    for (place, tensor) in tensors.iter().enumerate() {
        let (input, output) = (format!("INPUT{place}"), format!("OUTPUT{place}"));
        let node = [
            bytes(1, input.as_bytes()),
            bytes(2, output.as_bytes()),
            bytes(3, format!("copy{place}").as_bytes()),
            bytes(4, b"Identity"),
        ];
        graph.extend(bytes(1, &node.concat()));
        graph.extend(bytes(11, &described(&input, tensor)));
        graph.extend(bytes(12, &described(&output, tensor)));
    }
    let opset = integer(2, OPSET);
    [integer(1, IR), bytes(7, &graph), bytes(8, &opset)].concat()
}

/// A tensor's name, type and shape.
fn described(name: &str, tensor: &Copied) -> Vec<u8> {
    let batch = bytes(2, b"batch");
    let sizes = tensor.row.iter().map(|size| integer(1, *size));
    let dimensions = std::iter::once(batch).chain(sizes);
    let shape: Vec<u8> = dimensions.flat_map(|size| bytes(1, &size)).collect();
    let tensor_type = [integer(1, element_type(tensor.datatype)), bytes(2, &shape)];
    let value_type = bytes(1, &tensor_type.concat());
    [bytes(1, name.as_bytes()), bytes(2, &value_type)].concat()
}

fn element_type(datatype: Datatype) -> u64 {
    match datatype {
        Datatype::Fp32 => 1,
        Datatype::Uint8 => 2,
        Datatype::Int8 => 3,
        Datatype::Uint16 => 4,
        Datatype::Int16 => 5,
        Datatype::Int32 => 6,
        Datatype::Int64 => 7,
        Datatype::Bytes => 8,
        Datatype::Bool => 9,
        Datatype::Fp16 => 10,
        Datatype::Fp64 => 11,
        Datatype::Uint32 => 12,
        Datatype::Uint64 => 13,
        Datatype::Bf16 => 16,
    }
}

/// A field of a message that is a text or a message itself.
fn bytes(field: u64, content: &[u8]) -> Vec<u8> {
    const LENGTH_FIRST: u64 = 2;
    let key = varint((field << 3) | LENGTH_FIRST);
    [key, varint(content.len() as u64), content.to_vec()].concat()
}

/// A field of a message that is a whole number.
fn integer(field: u64, value: u64) -> Vec<u8> {
    [varint(field << 3), varint(value)].concat()
}

/// Seven bits in each byte, the lowest first; the eighth says that more follow.
fn varint(mut value: u64) -> Vec<u8> {
    let mut written = Vec::new();
    while value > 0x7f {
        written.push((value & 0x7f) as u8 | 0x80);
        value >>= 7;
    }
    written.push(value as u8);
    written
}
