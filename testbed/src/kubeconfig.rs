//! Kubeconfig files.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

/// What a kubeconfig says.
pub(crate) struct Kubeconfig<'a> {
    pub(crate) server: &'a str,
    pub(crate) ca_pem: &'a str,
    pub(crate) user: &'a str,
    pub(crate) token: &'a str,
    pub(crate) namespace: &'a str,
}

impl Kubeconfig<'_> {
    /// The file's contents.
    pub(crate) fn to_yaml(&self) -> String {
        let Self { server, ca_pem, user, token, namespace } = self;
        let ca = STANDARD.encode(ca_pem);
        format!(
            "\
apiVersion: v1
kind: Config
current-context: testbed
clusters:
- name: testbed
  cluster:
    server: {server}
    certificate-authority-data: {ca}
users:
- name: {user}
  user:
    token: {token}
contexts:
- name: testbed
  context:
    cluster: testbed
    user: {user}
    namespace: {namespace}
"
        )
    }
}
