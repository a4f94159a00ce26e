//! Reads every safetensors file of a directory with `memmap2` and `safetensors`, as Rust programs do, and prints a checksum
//! of each tensor: usage `checksums DIR`.

use memmap2::Mmap;
use safetensors::SafeTensors;
use std::error::Error;
use std::fs::File;

fn main() -> Result<(), Box<dyn Error>> {
    let dir = std::env::args().nth(1).ok_or("usage: checksums DIR")?;
    let mut paths: Vec<_> = std::fs::read_dir(dir)?.map(|e| Ok(e?.path())).collect::<std::io::Result<_>>()?;
    paths.retain(|p| p.extension().is_some_and(|e| e == "safetensors"));
    paths.sort();
    for path in paths {
        // SAFETY: as every program that maps a model: nobody truncates it meanwhile.
        let map = unsafe { Mmap::map(&File::open(&path)?) }?;
        let tensors = SafeTensors::deserialize(&map)?;
        let mut names = tensors.names();
        names.sort();
        for name in names {
            let tensor = tensors.tensor(name)?;
            let sum = xxhash_rust::xxh3::xxh3_128(tensor.data());
            println!("{sum:032x} {:?} {:?} {name}", tensor.dtype(), tensor.shape());
        }
    }
    Ok(())
}
