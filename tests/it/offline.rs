//! `rewrite`, `resolve` and the shape of the command line, as a user runs them.

use std::{
    fs,
    io::Write as _,
    path::PathBuf,
    process::{Command, Output, Stdio},
};

use crate::cluster::binary;

const ALIASES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/offline/aliases.yaml");

fn run(args: &[&str], stdin: &str) -> Output {
    let mut child = Command::new(binary())
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // A command that fails early does not read.
    let _ = child.stdin.take().unwrap().write_all(stdin.as_bytes());
    child.wait_with_output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

fn fixture(name: &str) -> String {
    fs::read_to_string(PathBuf::from(ALIASES).with_file_name(name)).unwrap()
}

#[test]
fn rewrite_changes_images_of_pods_and_of_every_workload_and_nothing_else() {
    let output = run(&["rewrite", "--aliases", ALIASES, "-"], &fixture("workloads.yaml"));
    assert_eq!(text(&output.stderr), "");
    assert_eq!(text(&output.stdout), fixture("workloads.expected.yaml"));
    assert_eq!(output.status.code(), Some(0));
    // Applied twice, nothing more.
    let again = run(&["rewrite", "--aliases", ALIASES, "-"], &text(&output.stdout));
    assert_eq!(again.stdout, output.stdout);
}

#[test]
fn rewrite_check_names_each_change_and_exits_with_one() {
    let output = run(&["rewrite", "--check", "--aliases", ALIASES, "-"], &fixture("workloads.yaml"));
    let lines = text(&output.stdout);
    let first = lines.lines().next().unwrap();
    assert_eq!(
        first,
        "1/spec.template.spec.containers[0].image: docker-ecr.internal.example.io/team/app:1 -> \
         123456789012.dkr.ecr.us-east-1.amazonaws.com/team/app:1"
    );
    assert_eq!(output.status.code(), Some(1));
    let clean = run(&["rewrite", "--check", "--aliases", ALIASES, "-"], &fixture("workloads.expected.yaml"));
    assert_eq!((text(&clean.stdout).as_str(), clean.status.code()), ("", Some(0)));
}

#[test]
fn rewrite_reads_json_and_lists() {
    let json = r#"{"apiVersion": "v1", "kind": "List", "items": [{"apiVersion": "v1", "kind": "Pod",
        "spec": {"containers": [{"name": "a", "image": "docker-ecr.internal.example.io\/a"}]}}]}"#;
    let output = run(&["rewrite", "--aliases", ALIASES, "-"], json);
    let value: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let image = &value["items"][0]["spec"]["containers"][0]["image"];
    assert_eq!(image, "123456789012.dkr.ecr.us-east-1.amazonaws.com/a");
}

#[test]
fn bad_input_says_where_and_exits_with_two() {
    let cases =
        [("a: b\n  c: [d\n", "<stdin>:2:"), ("a: 1\na: 2\n", "<stdin>:2:1: "), ("{\"a\": [}", "<stdin>:1:")];
    for (input, place) in cases {
        let output = run(&["rewrite", "--aliases", ALIASES, "-"], input);
        assert_eq!(output.status.code(), Some(2), "{input}");
        let error = text(&output.stderr);
        assert!(error.starts_with(&format!("error: {place}")), "{input}: {error}");
    }
    let missing = run(&["rewrite", "--aliases", ALIASES, "no-such-file.yaml"], "");
    assert_eq!(missing.status.code(), Some(2));
    assert!(text(&missing.stderr).contains("no-such-file.yaml: No such file"));
}

#[test]
fn resolve_prints_a_line_for_each_reference() {
    let references = ["docker-ecr.internal.example.io/app:1", "nginx", "hub.example.io:5000/library/nginx"];
    let output = run(&[&["resolve", "--aliases", ALIASES][..], &references].concat(), "");
    assert_eq!(
        text(&output.stdout),
        "docker-ecr.internal.example.io/app:1\t123456789012.dkr.ecr.us-east-1.amazonaws.com/app:1\n\
         nginx\t-\n\
         hub.example.io:5000/library/nginx\t123456789012.dkr.ecr.us-east-1.amazonaws.com/docker-hub/library/nginx\n"
    );
    let invalid = run(&["resolve", "--aliases", ALIASES, "nginx", "a.b/UPPER"], "");
    assert_eq!(invalid.status.code(), Some(2));
    assert!(text(&invalid.stderr).contains("\"a.b/UPPER\""), "{}", text(&invalid.stderr));
}

#[test]
fn an_alias_file_is_judged_like_the_aliases_of_a_cluster() {
    let directory = tempdir();
    let cases = [
        ("kind: Pod\n", "1:1: expected a RegistryAlias of ecr-cname.dev/v1alpha1, got \"Pod\""),
        (
            "apiVersion: ecr-cname.dev/v1alpha1\nkind: RegistryAlias\nmetadata: {name: a}\nspec: {hosst: a.b}\n",
            "1:1: spec: missing field `host`",
        ),
        (
            "---\napiVersion: ecr-cname.dev/v1alpha1\nkind: RegistryAlias\nmetadata: {name: a}\nspec: {host: a.b, registry: 123456789012.dkr.ecr.us-east-1.amazonaws.com, credentials: {roleArn: x, externalID: y}}\n",
            "2:1: unknown field spec.credentials.externalID",
        ),
        (
            "apiVersion: ecr-cname.dev/v1alpha1\nkind: RegistryAlias\nmetadata: {name: a}\nspec: {host: a.b, registry: ghcr.io}\n",
            "RegistryAlias \"a\": spec.registry: \"ghcr.io\" is not the host of an ECR private registry",
        ),
    ];
    for (i, (yaml, expected)) in cases.iter().enumerate() {
        let path = directory.join(format!("{i}.yaml"));
        fs::write(&path, yaml).unwrap();
        let output = run(&["resolve", "--aliases", path.to_str().unwrap(), "nginx"], "");
        assert_eq!(output.status.code(), Some(2), "{yaml}");
        let error = text(&output.stderr);
        assert!(error.contains(expected), "{yaml}: {error}");
    }
}

#[test]
fn help_reads_well_and_names_the_environment() {
    for command in ["run", "webhook", "controller", "rewrite", "resolve", "crd", "cleanup"] {
        let output = run(&[command, "--help"], "");
        assert_eq!(output.status.code(), Some(0), "{command}");
    }
    let help = text(&run(&["run", "--help"], "").stdout);
    for flag in
        ["--pull-secret", "ECR_CNAME_PULL_SECRET", "--webhook-url", "--failure-policy", "ECR_CNAME_AUDIT"]
    {
        assert!(help.contains(flag), "{flag}");
    }
}

fn tempdir() -> PathBuf {
    let path = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("offline-{}", std::process::id()));
    fs::create_dir_all(&path).unwrap();
    path
}
