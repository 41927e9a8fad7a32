//! JSON data of every kind, and what is refused.

use super::*;

fn decode(datatype: Datatype, json: &str) -> Result<TensorData, String> {
    let flat: FlatData = serde_json::from_str(json).map_err(|error| error.to_string())?;
    to_tensor_data("x", datatype, flat).map_err(|error| error.to_string())
}

#[test]
fn flat_and_nested_data_are_the_same() {
    let expected = TensorData::Fp32(vec![1.0, 2.5, 3.0, -4.0]);
    assert_eq!(decode(Datatype::Fp32, "[1, 2.5, 3, -4]").unwrap(), expected);
    assert_eq!(
        decode(Datatype::Fp32, "[[1, 2.5], [[3], -4]]").unwrap(),
        expected
    );
    assert!(decode(Datatype::Fp32, "[[[]], []]").unwrap().is_empty());
}

#[test]
fn integers_keep_every_bit() {
    let max = decode(Datatype::Uint64, "[1, 18446744073709551615]").unwrap();
    assert_eq!(max, TensorData::Uint64(vec![1, u64::MAX]));
    let min = decode(
        Datatype::Int64,
        "[-9223372036854775808, 9223372036854775807]",
    )
    .unwrap();
    assert_eq!(min, TensorData::Int64(vec![i64::MIN, i64::MAX]));
}

#[test]
fn every_datatype_takes_an_empty_array() {
    for datatype in Datatype::ALL
        .into_iter()
        .filter(|datatype| *datatype != Datatype::Bf16)
    {
        assert!(decode(datatype, "[]").unwrap().is_empty());
    }
}

#[test]
fn wrong_elements_are_named() {
    for (datatype, json, expected) in [
        (
            Datatype::Uint8,
            "[1, 256]",
            "tensor \"x\": element 1 is 256, expected UINT8",
        ),
        (
            Datatype::Uint32,
            "[-1]",
            "tensor \"x\": element 0 is -1, expected UINT32",
        ),
        (
            Datatype::Int32,
            "[1, 1.5]",
            "tensor \"x\": element 1 is 1.5, expected INT32",
        ),
        (
            Datatype::Fp32,
            "[\"a\"]",
            "tensor \"x\": element 0 is \"a\", expected FP32",
        ),
        (
            Datatype::Fp32,
            "[1, 1e39]",
            "tensor \"x\": element 1 is 1e39, expected FP32",
        ),
        (
            Datatype::Fp16,
            "[70000]",
            "tensor \"x\": element 0 is 7e4, expected FP16",
        ),
        (
            Datatype::Bool,
            "[1]",
            "tensor \"x\": element 0 is 1, expected BOOL",
        ),
        (
            Datatype::Bytes,
            "[true]",
            "tensor \"x\": element 0 is true, expected BYTES",
        ),
        (
            Datatype::Fp32,
            "[1, true]",
            "true among numbers at line 1 column 8",
        ),
        (
            Datatype::Fp32,
            "[null]",
            "invalid type: null, expected a number, boolean, string or array of them at line 1 column 5",
        ),
        (
            Datatype::Fp32,
            "7",
            "invalid type: integer `7`, expected an array of tensor elements at line 1 column 1",
        ),
        (
            Datatype::Bf16,
            "[1]",
            "tensor \"x\": BF16 data travels only in binary form, set parameters.binary_data_size",
        ),
    ] {
        assert_eq!(decode(datatype, json).unwrap_err(), expected, "{json}");
    }
    let deep = "[".repeat(4_000);
    assert!(
        decode(Datatype::Fp32, &deep)
            .unwrap_err()
            .contains("recursion limit")
    );
}

#[test]
fn what_json_cannot_carry_is_named() {
    let check = |data: TensorData| {
        let tensor = Tensor::new("y", vec![data.len() as u64], data).unwrap();
        check_encodable(&tensor).map_err(|error| error.to_string())
    };
    assert!(
        check(TensorData::Fp32(vec![1.0, f32::NAN]))
            .unwrap_err()
            .contains("element 1 is NaN")
    );
    assert!(
        check(TensorData::Fp64(vec![f64::INFINITY]))
            .unwrap_err()
            .contains("is inf")
    );
    assert!(check(TensorData::Fp16(vec![f16::INFINITY.to_bits()])).is_err());
    assert!(
        check(TensorData::Bytes(vec![vec![0xff]]))
            .unwrap_err()
            .contains("not UTF-8")
    );
    assert!(check(TensorData::Bf16(vec![0])).is_err());
    assert_eq!(check(TensorData::Fp32(vec![1.0])), Ok(()));
}
