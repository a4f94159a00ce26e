//! `--device`: where weights of our own are kept.

use crate::memory::cuda::{Device, DeviceName};
use anyhow::{anyhow, bail};
use std::fmt::Display;
use std::str::FromStr;
use std::sync::Arc;

/// GPU memory that is left to others when we choose a GPU ourselves.
const SPARE: u64 = 2 << 30;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeviceChoice {
    Auto,
    Cpu,
    Cuda(usize),
}

impl FromStr for DeviceChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<DeviceChoice, String> {
        match text {
            "auto" => Ok(DeviceChoice::Auto),
            "cpu" => Ok(DeviceChoice::Cpu),
            "cuda" => Ok(DeviceChoice::Cuda(0)),
            _ => match text.strip_prefix("cuda:").map(str::parse) {
                Some(Ok(n)) => Ok(DeviceChoice::Cuda(n)),
                _ => Err("use auto, cpu, cuda or cuda:N".into()),
            },
        }
    }
}

impl DeviceChoice {
    /// The GPU to load `bytes` of weights to; `None` for memory of the host.
    pub fn open(self, bytes: u64) -> anyhow::Result<Option<Arc<Device>>> {
        match self {
            DeviceChoice::Cpu => Ok(None),
            DeviceChoice::Cuda(n) => {
                let refused =
                    |e: &dyn Display| anyhow!("--device cuda:{n}: {e}; without that GPU, use --device cpu or auto");
                let id = DeviceName::Ordinal(n).find().map_err(|e| refused(&e))?;
                let device = Device::open(&id).map_err(|e| refused(&e))?;
                let (free, _) = device.memory()?;
                if free < bytes {
                    bail!(
                        "--device cuda:{n}: the weights take {bytes} bytes and {free} are free on {}; use --device cpu",
                        id.name
                    );
                }
                Ok(Some(device))
            }
            DeviceChoice::Auto => Ok(roomy(bytes)),
        }
    }
}

fn roomy(bytes: u64) -> Option<Arc<Device>> {
    let device = Device::open(&DeviceName::Ordinal(0).find().ok()?).ok()?;
    let (free, _) = device.memory().ok()?;
    (free >= bytes.saturating_add(SPARE)).then_some(device)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_named_as_pytorch_does() {
        assert_eq!("cuda".parse(), Ok(DeviceChoice::Cuda(0)));
        assert_eq!("cuda:3".parse(), Ok(DeviceChoice::Cuda(3)));
        for bad in ["", "gpu", "cuda:", "cuda:-1", "cuda:x"] {
            assert!(bad.parse::<DeviceChoice>().is_err(), "{bad}");
        }
    }
}
