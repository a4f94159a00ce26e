//! Kernels as PTX text in the program, and the driver's machine code of them.

use super::CudaError;
use super::error::Doing;
use cudarc::driver::{CudaContext, CudaFunction, CudaModule};
use parking_lot::Mutex;
use std::collections::HashMap;
use std::sync::Arc;

/// One `.cu` file's PTX: a baseline that runs on every device from its architecture on, and versions for one architecture
/// each (`90a`).
#[derive(Debug)]
pub struct Ptx {
    pub name: &'static str,
    /// Architecture (80 for 8.0) and text.
    pub baseline: (u32, &'static str),
    /// For exactly that architecture.
    pub exact: &'static [(u32, &'static str)],
}

impl Ptx {
    /// The text for a device of that compute capability.
    fn choose(&self, capability: (u32, u32)) -> Option<&'static str> {
        let arch = capability.0 * 10 + capability.1;
        let exact = self.exact.iter().find(|(a, _)| *a == arch);
        exact.or(Some(&self.baseline).filter(|(a, _)| *a <= arch)).map(|(_, text)| *text)
    }
}

#[derive(Default)]
pub(super) struct Modules(Mutex<HashMap<&'static str, Loaded>>);

struct Loaded {
    module: Arc<CudaModule>,
    functions: HashMap<String, CudaFunction>,
}

impl Modules {
    pub fn function(
        &self,
        context: &Arc<CudaContext>,
        capability: (u32, u32),
        ptx: &'static Ptx,
        name: &str,
    ) -> Result<CudaFunction, CudaError> {
        let mut modules = self.0.lock();
        if !modules.contains_key(ptx.name) {
            let loading = format!(
                "load the kernels '{}' on a device of compute capability {}.{}",
                ptx.name, capability.0, capability.1
            );
            let Some(text) = ptx.choose(capability) else {
                let code = cudarc::driver::sys::CUresult::CUDA_ERROR_NO_BINARY_FOR_GPU;
                return Err(CudaError::new(loading, cudarc::driver::DriverError(code)));
            };
            let module = context.load_module(cudarc::nvrtc::Ptx::from_src(text)).doing(&loading)?;
            modules.insert(ptx.name, Loaded { module, functions: HashMap::new() });
        }
        let Some(loaded) = modules.get_mut(ptx.name) else { unreachable!("inserted above") };
        if let Some(function) = loaded.functions.get(name) {
            return Ok(function.clone());
        }
        let function = loaded.module.load_function(name).doing(&format!("find the kernel '{name}'"))?;
        loaded.functions.insert(name.to_string(), function.clone());
        Ok(function)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_gets_its_own_version_or_the_baseline_and_an_older_one_nothing() {
        let ptx = Ptx { name: "test", baseline: (80, "base"), exact: &[(90, "hopper")] };
        assert_eq!(ptx.choose((9, 0)), Some("hopper"));
        assert_eq!(ptx.choose((8, 0)), Some("base"));
        assert_eq!(ptx.choose((12, 0)), Some("base"));
        assert_eq!(ptx.choose((7, 5)), None);
    }
}
