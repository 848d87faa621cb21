//! Many values as the arrays that a statement unnests.

use uuid::Uuid;

use crate::job::{Fence, JobKey};

pub(super) fn key_columns<'a>(
    keys: impl Iterator<Item = &'a JobKey>,
) -> (Vec<&'a str>, Vec<&'a str>) {
    keys.map(|key| (&*key.subscription, &*key.key)).unzip()
}

pub(super) fn attempts<'a>(fences: impl Iterator<Item = &'a Fence>) -> Vec<i32> {
    fences.map(|fence| fence.attempt.cast_signed()).collect()
}

pub(super) fn fence_tokens<'a>(fences: impl Iterator<Item = &'a Fence>) -> Vec<Uuid> {
    fences.map(|fence| fence.token).collect()
}
