//! The worker's pool of GPUs.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use tokio::sync::watch;

/// The `gpus` key of the configuration.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Written", into = "Written")]
pub enum Gpus {
    /// The GPUs in `CUDA_VISIBLE_DEVICES`, or else those that `nvidia-smi` lists.
    #[default]
    Auto,
    /// Indices or UUIDs, as in `CUDA_VISIBLE_DEVICES`.
    List(Vec<String>),
}

/// The accepted forms.
#[derive(Serialize, Deserialize)]
#[serde(
    untagged,
    expecting = "write \"auto\", 0 for none, or a list such as [\"0\", \"1\"]"
)]
enum Written {
    Text(String),
    Number(u64),
    List(Vec<Name>),
}

#[derive(Serialize, Deserialize)]
#[serde(untagged, expecting = "a GPU is named by its index or its UUID")]
enum Name {
    Text(String),
    Index(u64),
}

impl TryFrom<Written> for Gpus {
    type Error = String;

    fn try_from(written: Written) -> Result<Self, String> {
        let names = match written {
            Written::Text(word) if word == "auto" => return Ok(Self::Auto),
            // From the environment.
            Written::Text(word) if word == "0" => Vec::new(),
            Written::Number(0) => Vec::new(),
            Written::Text(_) | Written::Number(_) => {
                return Err(
                    "write \"auto\", 0 for none, or a list such as [\"0\", \"1\"]".to_owned(),
                );
            }
            Written::List(names) => names,
        };
        let names: Vec<String> = names
            .into_iter()
            .map(|name| match name {
                Name::Text(text) => text.trim().to_owned(),
                Name::Index(index) => index.to_string(),
            })
            .collect();
        for (nth, name) in names.iter().enumerate() {
            if name.is_empty() || name.contains([',', '\0']) {
                return Err(format!("`{name}` is not a GPU's name"));
            }
            if names[..nth].contains(name) {
                return Err(format!("`{name}` is listed twice"));
            }
        }
        Ok(Self::List(names))
    }
}

impl From<Gpus> for Written {
    fn from(gpus: Gpus) -> Self {
        match gpus {
            Gpus::Auto => Self::Text("auto".to_owned()),
            Gpus::List(names) => Self::List(names.into_iter().map(Name::Text).collect()),
        }
    }
}

/// The GPUs of one worker. Clones share the pool.
#[derive(Debug, Clone, Default)]
pub struct Devices {
    free: Arc<Mutex<VecDeque<String>>>,
    freed: watch::Sender<()>,
    total: usize,
}

/// The GPUs of one job. Dropping this returns them to the pool.
#[derive(Debug)]
pub struct DeviceSet {
    names: Vec<String>,
    free: Arc<Mutex<VecDeque<String>>>,
    freed: watch::Sender<()>,
}

impl Devices {
    /// A pool of devices with these names, which must differ.
    #[must_use]
    pub fn new(names: Vec<String>) -> Self {
        Self {
            total: names.len(),
            free: Arc::new(Mutex::new(names.into())),
            freed: watch::Sender::default(),
        }
    }

    /// Takes this many free devices, longest free first. `None` if fewer are free.
    #[must_use]
    pub fn take(&self, count: usize) -> Option<DeviceSet> {
        let mut free = lock(&self.free);
        if free.len() < count {
            return None;
        }
        Some(DeviceSet {
            names: free.drain(..count).collect(),
            free: Arc::clone(&self.free),
            freed: self.freed.clone(),
        })
    }

    /// Changes whenever some come free.
    #[must_use]
    pub fn freed(&self) -> watch::Receiver<()> {
        self.freed.subscribe()
    }

    /// How many are free.
    #[must_use]
    pub fn free(&self) -> usize {
        lock(&self.free).len()
    }

    /// How many there are in all.
    #[must_use]
    pub fn total(&self) -> usize {
        self.total
    }
}

impl DeviceSet {
    #[must_use]
    pub fn names(&self) -> &[String] {
        &self.names
    }
}

impl Drop for DeviceSet {
    fn drop(&mut self) {
        lock(&self.free).extend(self.names.drain(..));
        self.freed.send_replace(());
    }
}

fn lock(free: &Mutex<VecDeque<String>>) -> MutexGuard<'_, VecDeque<String>> {
    free.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
