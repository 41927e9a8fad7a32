//! Any bytes decode to a value or an error, and what is encoded decodes to itself.

use proptest::collection::vec;
use proptest::prelude::*;

use super::*;

/// Any data of a datatype; floats are finite so that JSON can carry them.
fn data(datatype: Datatype, count: usize) -> BoxedStrategy<TensorData> {
    let finite_f16 =
        || any::<u16>().prop_filter("finite", |bits| half::f16::from_bits(*bits).is_finite());
    let finite_f32 = || any::<f32>().prop_filter("finite", |value| value.is_finite());
    // Doubles of few digits: see the note on FP64 in `json`.
    let finite_f64 = || any::<i32>().prop_map(|value| f64::from(value) / 8.0);
    match datatype {
        Datatype::Bool => vec(any::<bool>(), count).prop_map(TensorData::Bool).boxed(),
        Datatype::Uint8 => vec(any::<u8>(), count).prop_map(TensorData::Uint8).boxed(),
        Datatype::Uint16 => vec(any::<u16>(), count)
            .prop_map(TensorData::Uint16)
            .boxed(),
        Datatype::Uint32 => vec(any::<u32>(), count)
            .prop_map(TensorData::Uint32)
            .boxed(),
        Datatype::Uint64 => vec(any::<u64>(), count)
            .prop_map(TensorData::Uint64)
            .boxed(),
        Datatype::Int8 => vec(any::<i8>(), count).prop_map(TensorData::Int8).boxed(),
        Datatype::Int16 => vec(any::<i16>(), count).prop_map(TensorData::Int16).boxed(),
        Datatype::Int32 => vec(any::<i32>(), count).prop_map(TensorData::Int32).boxed(),
        Datatype::Int64 => vec(any::<i64>(), count).prop_map(TensorData::Int64).boxed(),
        Datatype::Fp16 => vec(finite_f16(), count).prop_map(TensorData::Fp16).boxed(),
        Datatype::Bf16 => vec(any::<u16>(), count).prop_map(TensorData::Bf16).boxed(),
        Datatype::Fp32 => vec(finite_f32(), count).prop_map(TensorData::Fp32).boxed(),
        Datatype::Fp64 => vec(finite_f64(), count).prop_map(TensorData::Fp64).boxed(),
        Datatype::Bytes => vec(".{0,6}", count)
            .prop_map(|texts| {
                TensorData::Bytes(texts.into_iter().map(String::into_bytes).collect())
            })
            .boxed(),
    }
}

fn tensor() -> impl Strategy<Value = Tensor> {
    (0..Datatype::ALL.len(), vec(0u64..4, 0..4), "[a-z]{1,6}").prop_flat_map(
        |(datatype, shape, name)| {
            let count = shape.iter().product::<u64>() as usize;
            data(Datatype::ALL[datatype], count)
                .prop_map(move |data| Tensor::new(name.clone(), shape.clone(), data).unwrap())
        },
    )
}

fn request() -> impl Strategy<Value = InferRequest> {
    let parameter = prop_oneof![
        any::<bool>().prop_map(Parameter::Bool),
        any::<i64>().prop_map(Parameter::Int),
        "[a-z]{0,5}".prop_map(Parameter::String),
    ];
    let parameters = proptest::collection::btree_map("[a-b]{1,4}", parameter, 0..3);
    let output = (
        "[a-z]{1,6}",
        any::<Option<bool>>(),
        proptest::option::of(1u64..9),
    )
        .prop_map(|(name, binary_data, classes)| RequestedOutput {
            name,
            binary_data,
            classes,
            parameters: Parameters::new(),
        });
    let inputs = vec(tensor(), 0..4);
    (
        any::<Option<String>>(),
        parameters,
        inputs,
        vec(output, 0..3),
        any::<bool>(),
    )
        .prop_map(
            |(id, parameters, inputs, outputs, binary_data_output)| InferRequest {
                // An empty id is none.
                id: id.filter(|id| !id.is_empty()),
                parameters,
                inputs,
                outputs,
                binary_data_output,
                ..InferRequest::default()
            },
        )
}

fn has_bf16(tensors: &[Tensor]) -> bool {
    tensors
        .iter()
        .any(|tensor| tensor.datatype() == Datatype::Bf16)
}

proptest! {
    #[test]
    fn any_bytes_decode_to_a_value_or_an_error(
        body in vec(any::<u8>(), 0..200),
        length in proptest::option::of(0usize..300),
    ) {
        let _ = decode_request(&body, length);
        let _ = decode_response(&body, length);
    }

    /// Damaged requests reach far deeper than random bytes do.
    #[test]
    fn damaged_requests_decode_to_a_value_or_an_error(
        request in request(),
        binary in any::<bool>(),
        damage in vec((any::<prop::sample::Index>(), any::<u8>()), 0..4),
        cut in any::<prop::sample::Index>(),
        length_off_by in -3isize..4,
    ) {
        prop_assume!(binary || !has_bf16(&request.inputs));
        let mut body = encode_request(&request, binary).unwrap();
        for (at, byte) in damage {
            let at = at.index(body.bytes.len());
            body.bytes[at] = byte;
        }
        body.bytes.truncate(cut.index(body.bytes.len() + 1));
        let length = body.json_length.map(|length| length.saturating_add_signed(length_off_by));
        if let Ok(decoded) = decode_request(&body.bytes, length) {
            for tensor in &decoded.inputs {
                let count = tensor.shape().iter().product::<u64>();
                prop_assert_eq!(count, tensor.data().len() as u64);
            }
        }
    }

    #[test]
    fn requests_round_trip(request in request(), binary in any::<bool>()) {
        prop_assume!(binary || !has_bf16(&request.inputs));
        let body = encode_request(&request, binary).unwrap();
        prop_assert_eq!(body.json_length.is_some(), binary && !request.inputs.is_empty());
        prop_assert_eq!(decode_request(&body.bytes, body.json_length).unwrap(), request);
    }

    #[test]
    fn responses_round_trip(outputs in vec(tensor(), 0..4), id in any::<Option<String>>(), binary in any::<bool>()) {
        prop_assume!(binary || !has_bf16(&outputs));
        let response = InferResponse {
            model_name: "m".to_owned(),
            model_version: "1".to_owned(),
            id,
            outputs,
            ..InferResponse::default()
        };
        let request = InferRequest { binary_data_output: binary, ..InferRequest::default() };
        let body = encode_response(&response, &request).unwrap();
        prop_assert_eq!(decode_response(&body.bytes, body.json_length).unwrap(), response);
    }

    /// What crosses between a router and a replica keeps its value too.
    #[test]
    fn messages_round_trip_through_serde(request in request()) {
        let stored = serde_json::to_vec(&request).unwrap();
        prop_assert_eq!(serde_json::from_slice::<InferRequest>(&stored).unwrap(), request);
    }
}
