//! Hash trees as in RFC 6962, section 2.1: what an inclusion proof is, and how one is checked.
//!
//! Invariants:
//! 1. A leaf and an inner node never have the same input to the hash: their first bytes differ.
//! 2. Only hashes of complete subtrees are asked of a store: subtree `index` of `level` covers the leaves
//!    `index · 2^level` to `(index + 1) · 2^level - 1`, counted from 0.
//! 3. What a proof says is believed only after the root was computed from it.

use ring::digest::{Context, SHA256, SHA256_OUTPUT_LEN};

pub use super::hex::encode as to_hex;

/// A SHA-256.
pub type Hash = [u8; SHA256_OUTPUT_LEN];

/// Levels of the largest tree: leaves are counted in 64 bits.
const LEVELS_MAX: usize = 64;

fn sha256(parts: &[&[u8]]) -> Hash {
    let mut context = Context::new(&SHA256);
    for part in parts {
        context.update(part);
    }
    let digest = context.finish();
    digest.as_ref().try_into().expect("a SHA-256 has 32 bytes")
}

/// SHA-256 of `bytes`.
#[must_use]
pub fn hash(bytes: &[u8]) -> Hash {
    sha256(&[bytes])
}

/// The hash of a leaf.
#[must_use]
pub fn leaf(entry: &[u8]) -> Hash {
    sha256(&[&[0], entry])
}

/// The hash of an inner node.
#[must_use]
pub fn node(left: &Hash, right: &Hash) -> Hash {
    sha256(&[&[1], left, right])
}

/// The next hash of a chain.
#[must_use]
pub fn chained(before: &Hash, leaf: &Hash) -> Hash {
    sha256(&[before, leaf])
}

/// The root of a tree with these peaks (see [`peaks`]).
#[must_use]
pub fn root(peaks: &[Hash]) -> Hash {
    let Some((last, others)) = peaks.split_last() else {
        return hash(&[]);
    };
    others
        .iter()
        .rev()
        .fold(*last, |right, left| node(left, &right))
}

/// The complete subtrees, as `(level, index)`, that a tree of `size` leaves consists of, from the left.
pub fn peaks(size: u64) -> impl Iterator<Item = (u8, u64)> {
    let mut start = 0_u64;
    (0..64_u8)
        .rev()
        .filter(move |level| size >> level & 1 == 1)
        .map(move |level| {
            let index = start >> level;
            start += 1 << level;
            (level, index)
        })
}

/// The inclusion proof of leaf `index` in a tree of `size` leaves, from the leaf's sibling up; `subtree`
/// gives the hashes of complete subtrees. Empty where there is no such leaf.
pub fn prove(index: u64, size: u64, subtree: &dyn Fn(u8, u64) -> Hash) -> Vec<Hash> {
    let mut path = Vec::new();
    let (mut start, mut count) = (0, if index < size { size } else { 0 });
    while count > 1 {
        // The largest power of two below `count`.
        let left = 1_u64 << (63 - (count - 1).leading_zeros());
        if index < start + left {
            path.push(range(start + left, count - left, subtree));
            count = left;
        } else {
            path.push(range(start, left, subtree));
            (start, count) = (start + left, count - left);
        }
    }
    path.reverse();
    path
}

/// The hash over the leaves from `start` on. `start` is a multiple of the largest power of two in `count`.
fn range(start: u64, count: u64, subtree: &dyn Fn(u8, u64) -> Hash) -> Hash {
    let peaks: Vec<Hash> = peaks(count)
        .map(|(level, index)| subtree(level, (start >> level) + index))
        .collect();
    root(&peaks)
}

/// The root that follows from a leaf and its inclusion proof; `None` if the proof has another length than
/// one for this place. Source: RFC 9162, section 2.1.3.2.
#[must_use]
pub fn root_of_proof(leaf: Hash, index: u64, size: u64, path: &[Hash]) -> Option<Hash> {
    if index >= size || path.len() > LEVELS_MAX {
        return None;
    }
    let (mut index, mut last) = (index, size - 1);
    let mut hash = leaf;
    for sibling in path {
        if last == 0 {
            return None;
        }
        if index & 1 == 1 || index == last {
            hash = node(sibling, &hash);
            while index & 1 == 0 && index != 0 {
                index >>= 1;
                last >>= 1;
            }
        } else {
            hash = node(&hash, sibling);
        }
        index >>= 1;
        last >>= 1;
    }
    (last == 0).then_some(hash)
}

/// A tree that grows at its right end, of which only the peaks are kept.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Frontier {
    size: u64,
    peaks: Vec<Hash>,
}

impl Frontier {
    /// A tree of `size` leaves with these peaks; `None` if it has another number of them.
    #[must_use]
    pub fn new(size: u64, peaks: Vec<Hash>) -> Option<Self> {
        (size.count_ones() as usize == peaks.len()).then_some(Frontier { size, peaks })
    }

    /// Adds a leaf.
    pub fn push(&mut self, leaf: Hash) {
        let mut hash = leaf;
        // Each trailing one is a peak of the same height as what has been joined so far.
        for _ in 0..self.size.trailing_ones() {
            let left = self.peaks.pop().expect("a peak for each bit of the size");
            hash = node(&left, &hash);
        }
        self.peaks.push(hash);
        self.size += 1;
    }

    /// Leaves.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The root.
    #[must_use]
    pub fn root(&self) -> Hash {
        root(&self.peaks)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::registry::hex;

    /// Straight from the definition of MTH.
    fn by_definition(leaves: &[Hash]) -> Hash {
        match leaves {
            [] => hash(&[]),
            [one] => *one,
            many => {
                let left = many.len().next_power_of_two() / 2;
                node(&by_definition(&many[..left]), &by_definition(&many[left..]))
            }
        }
    }

    fn leaves(count: u8) -> Vec<Hash> {
        (0..count).map(|number| leaf(&[number])).collect()
    }

    #[test]
    fn roots_are_those_of_the_reference_implementation() {
        // Certificate Transparency's own test data: github.com/google/certificate-transparency,
        // cpp/merkletree/merkle_tree_test.cc.
        let inputs = [
            "",
            "00",
            "10",
            "2021",
            "3031",
            "40414243",
            "5051525354555657",
            "606162636465666768696a6b6c6d6e6f",
        ];
        let roots = [
            "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
            "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
            "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
            "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
            "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
            "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
            "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
            "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
        ];
        let mut tree = Frontier::default();
        for (input, root) in inputs.into_iter().zip(roots) {
            tree.push(leaf(&hex::decode(input).unwrap()));
            assert_eq!(hex::encode(&tree.root()), root);
        }
    }

    #[test]
    fn every_leaf_of_every_small_tree_has_a_proof_and_no_other_leaf_fits_it() {
        for size in 0..34_u8 {
            let leaves = leaves(size);
            let root = by_definition(&leaves);
            let mut tree = Frontier::default();
            for leaf in &leaves {
                tree.push(*leaf);
            }
            assert_eq!((tree.size(), tree.root()), (u64::from(size), root));
            let subtree = |level: u8, index: u64| {
                let (width, index) = (1_usize << level, usize::try_from(index).unwrap());
                by_definition(&leaves[index * width..(index + 1) * width])
            };
            let size = u64::from(size);
            for (index, leaf) in leaves.iter().enumerate() {
                let index = index as u64;
                let path = prove(index, size, &subtree);
                assert_eq!(root_of_proof(*leaf, index, size, &path), Some(root));
                let other = root_of_proof([7; 32], index, size, &path);
                assert_ne!(other, Some(root));
                let moved = root_of_proof(*leaf, (index + 1) % size, size, &path);
                assert!(size == 1 || moved != Some(root), "leaf {index} of {size}");
                if let Some((_, shorter)) = path.split_first() {
                    assert_ne!(root_of_proof(*leaf, index, size, shorter), Some(root));
                }
                let longer = [path.as_slice(), &[[0; 32]]].concat();
                assert_ne!(root_of_proof(*leaf, index, size, &longer), Some(root));
            }
            assert_eq!(prove(size, size, &subtree), Vec::<Hash>::new());
        }
    }

    #[test]
    fn a_frontier_goes_on_from_peaks() {
        let leaves = leaves(23);
        for kept in 0..23_usize {
            let head = &leaves[..kept];
            let peaks: Vec<Hash> = peaks(kept as u64)
                .map(|(level, index)| {
                    let (width, index) = (1_usize << level, usize::try_from(index).unwrap());
                    by_definition(&head[index * width..(index + 1) * width])
                })
                .collect();
            assert_eq!(root(&peaks), by_definition(head));
            let mut tree = Frontier::new(kept as u64, peaks).unwrap();
            for leaf in &leaves[kept..] {
                tree.push(*leaf);
            }
            assert_eq!(tree.root(), by_definition(&leaves));
        }
        assert_eq!(Frontier::new(3, vec![[0; 32]]), None);
    }
}
