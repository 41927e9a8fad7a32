//! The models in `golden` and what onnxruntime answers for them are made by `runtime/cli/tests/programs/onnx_models.py`.

use prost::Message;
use serde_json::Value;
use tract_onnx::pb::tensor_proto::{DataLocation, DataType};
use tract_onnx::pb::tensor_shape_proto::{Dimension, dimension};
use tract_onnx::pb::{GraphProto, NodeProto, TensorProto, type_proto};

use super::super::rows::Row;
use super::*;

macro_rules! golden {
    ($name:literal) => {
        (
            $name,
            include_bytes!(concat!("golden/", $name, ".onnx")).as_slice(),
            include_str!(concat!("golden/", $name, ".json")),
        )
    };
}

const GOLDEN: [(&str, &[u8], &str); 6] = [
    golden!("mlp"),
    golden!("cnn"),
    golden!("attention"),
    golden!("centred"),
    golden!("fixed"),
    golden!("types"),
];

fn bytes_of(name: &str) -> &'static [u8] {
    GOLDEN.iter().find(|golden| golden.0 == name).unwrap().1
}

fn cell(tensor: &Value) -> Cell {
    let shape = tensor["shape"].as_array().unwrap();
    let data = tensor["data"].as_array().unwrap();
    let integer = |value: &Value| value.as_i64().unwrap();
    let number = |value: &Value| value.as_f64().unwrap();
    Cell {
        shape: shape.iter().map(|size| size.as_u64().unwrap()).collect(),
        data: match tensor["datatype"].as_str().unwrap() {
            "BOOL" => TensorData::Bool(data.iter().map(|v| v.as_bool().unwrap()).collect()),
            "UINT8" => TensorData::Uint8(data.iter().map(|v| integer(v) as u8).collect()),
            "INT32" => TensorData::Int32(data.iter().map(|v| integer(v) as i32).collect()),
            "INT64" => TensorData::Int64(data.iter().map(integer).collect()),
            "FP16" => TensorData::Fp16(data.iter().map(|v| integer(v) as u16).collect()),
            "FP32" => TensorData::Fp32(data.iter().map(|v| number(v) as f32).collect()),
            "FP64" => TensorData::Fp64(data.iter().map(number).collect()),
            other => unreachable!("{other}"),
        },
    }
}

/// The inputs of each case, and what onnxruntime answered.
fn cases(name: &str) -> Vec<(Vec<Cell>, Vec<Cell>)> {
    let text = GOLDEN.iter().find(|golden| golden.0 == name).unwrap().2;
    let cases: Value = serde_json::from_str(text).unwrap();
    let cells = |tensors: &Value| tensors.as_array().unwrap().iter().map(cell).collect();
    let cases = cases.as_array().unwrap().iter();
    cases
        .map(|case| (cells(&case["inputs"]), cells(&case["outputs"])))
        .collect()
}

fn assert_near(found: &Cell, expected: &Cell, what: &str) {
    const TOLERANCE: f32 = 1e-5;
    assert_eq!(found.shape, expected.shape, "{what}");
    match (&found.data, &expected.data) {
        (TensorData::Fp32(found), TensorData::Fp32(expected)) => {
            for (found, expected) in found.iter().zip(expected) {
                let scale = expected.abs().max(1.0);
                assert!(
                    (found - expected).abs() <= TOLERANCE * scale,
                    "{what}: {found} {expected}"
                );
            }
        }
        (TensorData::Fp64(found), TensorData::Fp64(expected)) => {
            // The last bit is lost in the text of the golden file.
            for (found, expected) in found.iter().zip(expected) {
                assert!(
                    (found - expected).abs() <= 1e-12,
                    "{what}: {found} {expected}"
                );
            }
        }
        (found, expected) => assert_eq!(found, expected, "{what}"),
    }
}

#[test]
fn it_answers_as_onnxruntime_does() {
    for (name, bytes, _) in GOLDEN {
        let model = OnnxModel::load(bytes).unwrap();
        model.describe().unwrap();
        for (number, (inputs, outputs)) in cases(name).into_iter().enumerate() {
            let rows = model.is_batched.then(|| inputs[0].shape[0]);
            let cells = inputs;
            let answer = model.run(Batch { rows, cells }).unwrap();
            assert_eq!(answer.cells.len(), outputs.len(), "{name}");
            for (found, expected) in answer.cells.iter().zip(&outputs) {
                assert_near(found, expected, &format!("{name}, case {number}"));
            }
        }
    }
}

#[test]
fn what_it_takes_and_gives_comes_from_the_graph() {
    let described = |name: &str| {
        let found = OnnxModel::load(bytes_of(name)).unwrap().describe().unwrap();
        let tensors = format!("{} -> {}", listed(&found.inputs), listed(&found.outputs));
        (tensors, found.max_batch_size)
    };
    for (name, tensors, max_batch_size) in [
        (
            "mlp",
            "x FP32[-1, 4] -> probabilities FP32[-1, 3], class INT64[-1]",
            128,
        ),
        ("cnn", "image FP32[-1, 1, 8, 8] -> scores FP32[-1, 2]", 128),
        (
            "attention",
            "tokens INT64[-1, -1], mask FP32[-1, -1] -> embedding FP32[-1, 4]",
            128,
        ),
        // Its graph carries the batch through, and the trial shows that rows depend on each other.
        ("centred", "x FP32[-1, 3] -> y FP32[-1, 3]", 0),
        ("fixed", "a FP32[2, 3], b FP32[3] -> sum FP32[2, 3]", 0),
    ] {
        assert_eq!(
            described(name),
            (tensors.to_owned(), max_batch_size),
            "{name}"
        );
    }
}

#[test]
fn rows_are_answered_in_a_batch_as_they_are_alone() {
    let model = OnnxModel::load(bytes_of("mlp")).unwrap();
    let rows: Vec<Row> = cases("mlp")
        .into_iter()
        .flat_map(|(cells, _)| {
            let rows = Some(cells[0].shape[0]);
            Batch { rows, cells }.split().unwrap()
        })
        .map(|row| Row {
            batch_rows_max: Some(128),
            ..row
        })
        .collect();
    let together = model
        .run(Batch::join(rows.clone()))
        .unwrap()
        .split()
        .unwrap();
    assert_eq!(together.len(), 6);
    for (row, expected) in rows.into_iter().zip(together) {
        let alone = model.run(Batch::join(vec![row])).unwrap().split().unwrap();
        for (found, expected) in alone[0].cells.iter().zip(&expected.cells) {
            assert_near(found, expected, "a row");
        }
    }
}

#[test]
fn a_description_of_another_model_is_refused() {
    let model = OnnxModel::load(bytes_of("mlp")).unwrap();
    let good = model.describe().unwrap();
    let check = |described: &Described| {
        model.check_described(
            &described.inputs,
            &described.outputs,
            described.max_batch_size,
        )
    };
    check(&good).unwrap();
    let mut labelled = good.clone();
    labelled.outputs[0].labels = vec!["a".into()];
    check(&labelled).unwrap();
    let mut wide = good;
    wide.inputs[0].shape[1] = 5;
    let error = check(&wide).unwrap_err().to_string();
    assert!(
        error.contains("x FP32[-1, 5]") && error.contains("x FP32[-1, 4]"),
        "{error}"
    );
    let fixed = OnnxModel::load(bytes_of("fixed")).unwrap();
    let mut joined = fixed.describe().unwrap();
    joined.max_batch_size = 4;
    let refused = fixed.check_described(&joined.inputs, &joined.outputs, 4);
    assert!(matches!(refused, Err(OnnxError::Described { .. })));
}

#[test]
fn values_that_do_not_fit_are_errors() {
    let model = OnnxModel::load(bytes_of("mlp")).unwrap();
    let ask = |shape: &[u64], count: usize| {
        let cell = Cell {
            shape: shape.to_vec(),
            data: TensorData::Fp32(vec![0.5; count]),
        };
        let rows = shape.first().copied();
        model.run(Batch {
            rows,
            cells: vec![cell],
        })
    };
    ask(&[2, 4], 8).unwrap();
    for (shape, count) in [
        (&[2, 4][..], 7),
        (&[2, 5], 10),
        (&[u64::MAX, 4], 4),
        (&[], 1),
    ] {
        let error = ask(shape, count).unwrap_err();
        assert!(matches!(error, OnnxError::Run(_)), "{shape:?}: {error}");
    }
    let none = model.run(Batch {
        rows: Some(1),
        cells: Vec::new(),
    });
    assert!(
        none.unwrap_err()
            .to_string()
            .contains("0 inputs were given, it takes 1")
    );
}

#[test]
fn every_cut_is_refused() {
    for (name, bytes, _) in GOLDEN {
        for length in 0..bytes.len() {
            assert!(
                OnnxModel::load(&bytes[..length]).is_err(),
                "{name}, {length} bytes"
            );
        }
    }
}

fn damaged(name: &str, change: impl FnOnce(&mut ModelProto)) -> String {
    let mut proto = ModelProto::decode(bytes_of(name)).unwrap();
    change(&mut proto);
    match OnnxModel::load(&proto.encode_to_vec()) {
        Ok(_) => panic!("it was taken"),
        Err(error) => error.to_string(),
    }
}

fn graph(proto: &mut ModelProto) -> &mut GraphProto {
    proto.graph.as_mut().unwrap()
}

fn output_type(proto: &mut ModelProto) -> &mut type_proto::Tensor {
    let of = graph(proto).output[0].r#type.as_mut().unwrap();
    let Some(type_proto::Value::TensorType(tensor)) = of.value.as_mut() else {
        unreachable!("outputs are tensors")
    };
    tensor
}

#[test]
fn what_is_wrong_with_a_file_is_named() {
    let node = |op_type: &str, domain: &str| NodeProto {
        op_type: op_type.to_owned(),
        domain: domain.to_owned(),
        input: vec!["x".to_owned()],
        output: vec!["z".to_owned()],
        ..NodeProto::default()
    };
    let cases: Vec<(String, &[&str])> = vec![
        (
            damaged("mlp", |proto| proto.graph = None),
            &["it has no graph"],
        ),
        (
            damaged("mlp", |proto| proto.opset_import.clear()),
            &["names no operator set"],
        ),
        (
            damaged("mlp", |proto| graph(proto).initializer[0].dims = vec![4, 7]),
            &["\"w1\" claims the shape [4, 7]", "112 bytes, and has 96"],
        ),
        (
            damaged("mlp", |proto| {
                graph(proto).initializer[0].dims = vec![i64::MAX, 2, 2];
            }),
            &["\"w1\" claims the shape"],
        ),
        (
            damaged("mlp", |proto| {
                graph(proto).initializer[0].dims = vec![-4, -6]
            }),
            &["claims the shape [-4, -6]"],
        ),
        (
            damaged("mlp", |proto| {
                let constant = &mut graph(proto).initializer[0];
                constant.raw_data.clear();
                constant.float_data = vec![0.5; 23];
            }),
            &["24 elements, and has 23"],
        ),
        (
            damaged("mlp", |proto| graph(proto).initializer[0].data_type = 999),
            &["unknown type 999"],
        ),
        (
            damaged("mlp", |proto| {
                graph(proto).initializer[0].data_location = Some(DataLocation::External as i32);
            }),
            &["\"w1\" lies in another file", "weights inside"],
        ),
        (
            damaged("mlp", |proto| {
                graph(proto).node.push(node("Fancy", "com.example"));
                graph(proto).node.push(node("Fancier", ""));
            }),
            &["ai.onnx.Fancier, com.example.Fancy", "another opset"],
        ),
        (
            damaged("mlp", |proto| {
                let repeated = graph(proto).node[1].clone();
                graph(proto).node = vec![repeated; 50_001];
            }),
            &["more than 50000 nodes"],
        ),
        (
            damaged("mlp", |proto| graph(proto).output[1].name = "nobody".into()),
            &["output \"nobody\" is computed by nothing"],
        ),
        (
            damaged("mlp", |proto| {
                let twice = graph(proto).output[0].clone();
                graph(proto).output.push(twice);
            }),
            &["output \"probabilities\" is given twice"],
        ),
        (
            damaged("mlp", |proto| graph(proto).input.clear()),
            &["0 inputs"],
        ),
        (
            damaged("fixed", |proto| {
                for tensor in &mut graph(proto).input {
                    let of = tensor.r#type.as_mut().unwrap();
                    let Some(type_proto::Value::TensorType(of)) = of.value.as_mut() else {
                        unreachable!("inputs are tensors")
                    };
                    let sizes = &mut of.shape.as_mut().unwrap().dim;
                    let last = sizes.last_mut().unwrap();
                    last.value = Some(dimension::Value::DimValue(1 << 40));
                }
            }),
            &["input \"a\" takes 8796093022208 bytes", "4194304"],
        ),
        (
            damaged("mlp", |proto| {
                let of = graph(proto).input[0].r#type.as_mut().unwrap();
                let Some(type_proto::Value::TensorType(tensor)) = of.value.as_mut() else {
                    unreachable!("inputs are tensors")
                };
                tensor.elem_type = DataType::String as i32;
            }),
            &["input \"x\" is of the type 8", "take numbers"],
        ),
        (
            damaged("mlp", |proto| {
                let sizes = &mut output_type(proto).shape.as_mut().unwrap().dim;
                sizes[1].value = Some(dimension::Value::DimValue(5));
            }),
            &["said to be FP32[-1, 5] and computed as FP32[-1, 3]"],
        ),
        (
            damaged("mlp", |proto| {
                let sizes = &mut output_type(proto).shape.as_mut().unwrap().dim;
                sizes.push(Dimension::default());
            }),
            &["said to be FP32[-1, 3, -1]"],
        ),
        (
            damaged("mlp", |proto| {
                output_type(proto).elem_type = DataType::Int32 as i32
            }),
            &["said to be INT32[-1, 3]"],
        ),
        (
            damaged("mlp", |proto| {
                graph(proto).node[1].input[0] = "nothing".into()
            }),
            &["nothing"],
        ),
    ];
    for (error, expected) in cases {
        for expected in expected {
            assert!(error.contains(expected), "{expected:?} is not in {error:?}");
        }
    }
    let large = vec![0; usize::try_from(ONNX_BYTES_MAX).unwrap() + 1];
    let error = OnnxModel::load(&large).err().unwrap().to_string();
    assert!(
        error.contains("314572801 bytes, the limit is 314572800"),
        "{error}"
    );
}

#[test]
fn what_is_made_of_a_shape_alone_does_not_fill_the_memory() {
    let shape = TensorProto {
        name: "sizes".into(),
        dims: vec![2],
        data_type: DataType::Int64 as i32,
        int64_data: vec![1 << 30, 1 << 30],
        ..TensorProto::default()
    };
    let raw = TensorProto {
        int64_data: Vec::new(),
        raw_data: [1i64 << 30; 2].map(i64::to_le_bytes).concat(),
        ..shape.clone()
    };
    let made = |op_type: &str, input: &[&str]| NodeProto {
        op_type: op_type.to_owned(),
        input: input.iter().map(|name| (*name).to_owned()).collect(),
        output: vec!["huge".to_owned()],
        ..NodeProto::default()
    };
    for (shape, node) in [
        (&shape, made("ConstantOfShape", &["sizes"])),
        (&raw, made("ConstantOfShape", &["sizes"])),
        (&raw, made("Expand", &["x", "sizes"])),
    ] {
        let error = damaged("mlp", |proto| {
            let graph = graph(proto);
            graph.initializer.push(shape.clone());
            graph.node.push(node);
            graph.output[0].name = "huge".into();
        });
        let expected = "\"huge\" is to have 1152921504606846976 elements, the limit is 314572800";
        assert!(error.contains(expected), "{error}");
    }
}

#[test]
fn a_model_is_prepared_on_a_thread_of_its_own() {
    let here = std::thread::current().id();
    let bytes = Bytes::from_static(bytes_of("mlp"));
    let (there, described) = OnnxModel::prepared(bytes.clone(), |model| {
        Ok((std::thread::current().id(), model.describe()?))
    })
    .unwrap();
    assert_ne!(there, here);
    assert_eq!(described.max_batch_size, 128);
    let refused = OnnxModel::prepared(Bytes::from_static(b"no model"), |_| Ok(()));
    assert!(matches!(refused, Err(OnnxError::Malformed(_))));
    let panicked = OnnxModel::prepared::<()>(bytes, |_| panic!("not this"));
    assert_eq!(panicked, Err(OnnxError::Panicked("not this".to_owned())));
}
