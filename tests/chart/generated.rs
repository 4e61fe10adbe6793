//! What is generated from the chart, and for it, is up to date.

use std::fs;

use testbed::generated;

#[tokio::test]
async fn every_generated_file_is_up_to_date() {
    for (path, contents) in generated::files().await.unwrap() {
        let kept = fs::read_to_string(&path).unwrap_or_default();
        assert!(kept == contents, "{} is not: run `cargo testbed generate`", path.display());
    }
}
