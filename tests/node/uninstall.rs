//! What is left when the release is gone. The last test by name, because it leaves no release to the others.

use serde_json::{Value, json};
use testbed::operator::NAMESPACE;

use crate::world::{Release, alone, container};

#[tokio::test]
async fn uninstalling_leaves_the_definition_and_the_aliases() {
    let Some((world, mut release)) = alone().await else { return };
    *release = Release::Other;
    let namespace = world.namespace(&[]).await;
    let host = world.alias(&namespace, json!({})).await;
    world
        .until("the pull secret", &namespace, async || {
            world.get(&namespace, "secret/ecr-cname").await.map(drop)
        })
        .await;

    world.uninstall_release().await;

    assert!(world.get("", "crd/registryaliases.ecr-cname.dev").await.is_some());
    assert!(world.get("", &format!("registryalias/{namespace}")).await.is_some());
    let ours = |objects: Vec<Value>| -> Vec<Value> {
        objects
            .into_iter()
            .map(|object| object["metadata"]["name"].clone())
            .filter(|name| name.as_str().unwrap_or_default().starts_with("ecr-cname"))
            .collect()
    };
    let in_namespace = "all,secrets,configmaps,serviceaccounts,roles,rolebindings,leases,poddisruptionbudgets,networkpolicies";
    world
        .until("the pods to be gone", NAMESPACE, async || {
            world.list(NAMESPACE, "pods").await.is_empty().then_some(())
        })
        .await;
    assert_eq!(ours(world.list(NAMESPACE, in_namespace).await), Vec::<Value>::new());
    let everywhere = "clusterroles,clusterrolebindings,mutatingwebhookconfigurations,\
                      validatingadmissionpolicies,validatingadmissionpolicybindings";
    assert_eq!(ours(world.list("", everywhere).await), Vec::<Value>::new());
    let secrets = world.kubectl(&["get", "secrets", "--all-namespaces", "--output=name"]).await;
    assert!(!secrets.contains("secret/ecr-cname"), "{secrets}");

    // Nobody is asked any more, and nobody is refused.
    let image = format!("{host}/{namespace}/app:1");
    let pod = world.pod(&namespace, "after", json!({}), container(&image)).await;
    assert_eq!(pod["spec"]["containers"][0]["image"], image);
}
