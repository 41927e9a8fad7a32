use super::*;

fn question(labels: &[&str], approvals: u64) -> Question {
    let texts = |texts: &[&str]| Value::Texts(texts.iter().map(|&text| text.to_owned()).collect());
    Question {
        principal: "ann".to_owned(),
        action: "Deploy",
        resource: Thing {
            kind: "ModelVersion",
            id: "digits:3".to_owned(),
            attributes: vec![
                ("model", Value::Text("digits".to_owned())),
                ("version", Value::Number(3)),
                ("stage", Value::Text("staging".to_owned())),
                ("risk", Value::Text("normal".to_owned())),
                ("labels", texts(labels)),
                ("tags", texts(&["team=vision"])),
                ("missing", texts(&[])),
            ],
            metrics: BTreeMap::from([
                ("accuracy".to_owned(), 0.97),
                ("perplexity".to_owned(), f64::INFINITY),
            ]),
        },
        context: vec![
            ("endpoint", Value::Text("digits".to_owned())),
            ("rollout", Value::Flag(false)),
            ("approvers", Value::Keys([String::from("k1")].into())),
            ("approvals", Value::Number(approvals)),
        ],
        keys: vec![Thing {
            kind: "Key",
            id: "k1".to_owned(),
            attributes: vec![
                ("owner", Value::Text("eve".to_owned())),
                ("roles", texts(&["approve"])),
            ],
            metrics: BTreeMap::new(),
        }],
    }
}

fn verdict(text: &str, labels: &[&str], approvals: u64) -> (bool, Vec<String>) {
    let verdict = decide(text, &question(labels, approvals));
    assert_eq!(verdict.errors, [] as [String; 0], "{text}");
    let ids = verdict.policies.into_iter().map(|policy| policy.id);
    (verdict.permitted, ids.collect())
}

#[test]
fn the_shipped_policies_demand_an_approval_where_the_label_does() {
    assert_eq!(check(""), Ok(vec![]));
    let permitted = (true, vec!["allowed-unless-forbidden".to_owned()]);
    assert_eq!(verdict("", &[], 0), permitted);
    assert_eq!(verdict("", &["public"], 0), permitted);
    assert_eq!(verdict("", &["pii"], 1), permitted);
    let denied = (false, vec!["pii-needs-approval".to_owned()]);
    assert_eq!(verdict("", &["pii", "public"], 0), denied);
    let told = decide("", &question(&["pii"], 0)).policies.remove(0);
    assert!(told.reason.unwrap().contains("`pii`"));
    assert!(told.next.unwrap().contains("mobula approvals add"));
}

#[test]
fn policies_tighten_and_none_is_stronger_than_a_shipped_one() {
    let two = r#"@id("two") forbid (principal, action, resource)
        when { resource.labels.contains("pii") && context.approvals < 2 };"#;
    assert_eq!(check(two), Ok(vec!["two".to_owned()]));
    assert_eq!(verdict(two, &["pii"], 1), (false, vec!["two".to_owned()]));
    assert!(verdict(two, &["pii"], 2).0);
    let open = r#"@id("open") permit (principal, action, resource);"#;
    assert!(!verdict(open, &["pii"], 0).0);
    let measured = r#"@id("measured") forbid (principal, action == Action::"Deploy", resource)
        unless { resource.hasTag("accuracy") &&
                 resource.getTag("accuracy").greaterThanOrEqual(decimal("0.98")) };"#;
    assert_eq!(
        verdict(measured, &[], 0),
        (false, vec!["measured".to_owned()])
    );
    assert!(verdict(&measured.replace("0.98", "0.97"), &[], 0).0);
    let who = r#"@id("who") forbid (principal, action in [Action::"Deploy", Action::"Promote"], resource)
        unless { context.approvers.contains(Key::"k1") && principal == Principal::"ann" };"#;
    assert!(verdict(who, &[], 0).0);
    // A metric that is no number is none.
    let infinite = r#"@id("infinite") forbid (principal, action == Action::"Deploy", resource)
        when { resource.hasTag("perplexity") };"#;
    assert!(verdict(infinite, &[], 0).0);
}

#[test]
fn what_is_no_policy_is_refused_with_the_place_and_what_is_expected() {
    let long = format!("// {}", "x".repeat(TEXT_BYTES_MAX));
    let deep = format!(
        "@id(\"deep\") permit (principal, action, resource) when {{ {}1 == 1",
        "(".repeat(40)
    );
    let many = (0..=POLICIES_MAX)
        .map(|number| format!("@id(\"{number}\") permit (principal, action, resource);\n"))
        .collect::<String>();
    let cases: [(&str, &[&str]); 10] = [
        (
            "@id(\"a\")\nforbid (principal, action, resource\n  when { true };",
            &["line 3, column 3", "unexpected token `when`", "expected"],
        ),
        (
            "permit (principal, action, resource);",
            &["policy 1", "has no `@id"],
        ),
        (
            "@id(\"a\")\npermit (principal, action, resource)\nwhen { resource.colour == 1 };",
            &["line 3", "colour"],
        ),
        (
            "@id(\"a\") permit (principal, action == Action::\"Sell\", resource);",
            &["line 1", "Sell"],
        ),
        (
            "@id(\"pii-needs-approval\") permit (principal, action, resource);",
            &["two policies have the id `pii-needs-approval`"],
        ),
        (
            "@id(\"a\") permit (principal == ?principal, action, resource);",
            &["policy 1", "slots"],
        ),
        (
            "@id(\"a\") forbid (principal, action, resource) when { resource.getTag(\"loss\").lessThan(decimal(\"1.0\")) };",
            &["line 1", "tag"],
        ),
        (&long, &["the limit is 32768"]),
        (&deep, &["line 1, column", "nested more than 32"]),
        (&many, &["257 policies, the limit is 256"]),
    ];
    for (text, expected) in cases {
        let error = check(text).unwrap_err().to_string();
        for part in expected {
            assert!(error.contains(part), "{part}: {error}");
        }
        assert!(error.len() < 2_000, "{error}");
    }
    // Brackets in texts and behind `//` nest nothing.
    let brackets = "(".repeat(100);
    let text = format!(
        "// {brackets}\n@id(\"a\") @reason(\"\\\\\\\"{brackets}\") permit (principal, action, resource);"
    );
    assert_eq!(check(&text), Ok(vec!["a".to_owned()]));
}

/// Chains and choices that people do not write and a program may, as long as `size`.
fn deep_policies(size: usize) -> Vec<String> {
    let around =
        |body: &str| format!("@id(\"a\") forbid (principal, action, resource) when {{ {body} }};");
    let room = size - around("").len();
    let repeated = |part: &str, end: &str| {
        let count = (room - end.len()) / part.len();
        around(&format!("{}{end}", part.repeat(count)))
    };
    vec![
        repeated("1+", "1 == 2"),
        repeated("true&&", "true"),
        repeated("false||", "true"),
        repeated("if true then true else ", "true"),
        repeated("if true then ", "true"),
        repeated("!", "true"),
        around(&format!("resource{} == 1", ".a".repeat(room / 2 - 10))),
        around(&format!("[{}1].isEmpty()", "1,".repeat(room / 2 - 20))),
        around(&format!("context has a{}", ".a".repeat(room / 2 - 20))),
    ]
}

/// On the stack of a test's thread, which has 2 MiB.
#[test]
fn the_deepest_policies_come_to_no_end_of_a_stack() {
    for text in deep_policies(POLICY_BYTES_MAX) {
        let shown: String = text.chars().skip(50).take(40).collect();
        let is_deep = |told: &str| told.contains("recursion") || told.contains("stack");
        match check(&text) {
            Ok(_) => {
                let verdict = decide(&text, &question(&[], 0));
                let errors = &verdict.errors;
                assert!(
                    !errors.iter().any(|error| is_deep(error)),
                    "{shown}: {errors:?}"
                );
            }
            Err(error) => assert!(!is_deep(&error.to_string()), "{shown}: {error}"),
        }
    }
    for text in deep_policies(TEXT_BYTES_MAX) {
        assert!(check(&text).is_err());
    }
    let long = &deep_policies(POLICY_BYTES_MAX + 100)[1];
    let error = check(long).unwrap_err().to_string();
    assert!(
        error.contains("policy 1") && error.contains("the limit is 4096"),
        "{error}"
    );
}

#[test]
fn a_policy_that_fails_denies() {
    let overflow = r#"@id("overflow") forbid (principal, action == Action::"Deploy", resource)
        when { resource.version * 9223372036854775807 > 1 };"#;
    assert!(check(overflow).is_ok());
    let verdict = decide(overflow, &question(&[], 0));
    assert!(
        !verdict.permitted && verdict.errors[0].contains("overflow"),
        "{verdict:?}"
    );
    // Nor does a question that the schema does not know, or a text that nobody checked.
    let mut wrong = question(&[], 0);
    wrong.context.pop();
    for verdict in [decide("", &wrong), decide("no policy", &question(&[], 0))] {
        assert!(
            !verdict.permitted && !verdict.errors.is_empty(),
            "{verdict:?}"
        );
    }
}

#[test]
fn policies_are_listed_with_what_they_do() {
    let ids: Vec<(String, &str)> = list("")
        .unwrap()
        .into_iter()
        .map(|one| (one.id, one.effect))
        .collect();
    let expected = [
        ("allowed-unless-forbidden", "permit"),
        ("pii-needs-approval", "forbid"),
    ];
    assert_eq!(ids, expected.map(|(id, effect)| (id.to_owned(), effect)));
}

#[test]
fn the_policies_of_the_page_for_people_are_policies() {
    let page = include_str!("../../../../docs/policy.md");
    let (_, block) = page.split_once("```cedar\n").unwrap();
    let (text, _) = block.split_once("```").unwrap();
    assert_eq!(check(text).unwrap().len(), 3);
    let two = verdict(text, &["faces"], 1);
    assert_eq!(two, (false, vec!["two-approve-faces".to_owned()]));
    assert!(verdict(text, &["faces"], 2).0);
}
