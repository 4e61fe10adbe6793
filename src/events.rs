//! Events, written beside the work that they speak of: an API server that is slow must not hold that up.

use k8s_openapi::api::core::v1::ObjectReference;
use kube::runtime::events::{Event, Recorder};
use tokio::sync::mpsc;
use tracing::debug;

use crate::watch::{bounded, chain};

/// How many Events may wait to be written; further ones are dropped, for the condition says the same.
const WAITING: usize = 1024;

/// Where Events are handed in.
#[derive(Clone, Debug)]
pub struct Events(mpsc::Sender<(ObjectReference, Event)>);

impl Events {
    /// A place to hand Events in, and what writes them, one after the other, for as long as the former is there.
    pub fn new(recorder: Recorder) -> (Self, impl Future<Output = ()> + Send) {
        let (send, mut waiting) = mpsc::channel::<(ObjectReference, Event)>(WAITING);
        let write = async move {
            while let Some((regarding, event)) = waiting.recv().await {
                if let Err(error) = bounded(recorder.publish(&event, &regarding)).await {
                    debug!(error = %chain(&error), "an event could not be written");
                }
            }
        };
        (Self(send), write)
    }

    /// Says something about an object.
    pub fn say(&self, regarding: ObjectReference, event: Event) {
        // Where too many wait already, the condition and the log have to do.
        let _ = self.0.try_send((regarding, event));
    }
}
