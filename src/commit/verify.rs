//! Checks: the directory against the newest commit's block hashes, and a commit against the checksums in its record.

use super::error::CommitError;
use super::replay::layers;
use super::report::VerifyReport;
use super::state::hex;
use super::{Committer, Shared, optimizer, recover};
use rayon::prelude::*;

impl Committer {
    /// Without an id: the weights files (and what the log has beyond them) against the newest commit. With one: the
    /// record's own checksums, and every tensor it changed as it was at that commit.
    pub fn verify(&self, id: Option<u64>) -> Result<VerifyReport, CommitError> {
        let _working = self.working.lock();
        self.shared.verify(id)
    }
}

impl Shared {
    pub(super) fn verify(&self, id: Option<u64>) -> Result<VerifyReport, CommitError> {
        match id {
            None => self.verify_directory(),
            Some(id) => self.verify_commit(id),
        }
    }

    fn verify_directory(&self) -> Result<VerifyReport, CommitError> {
        let (newest, record) = {
            let published = self.published.read();
            (published.state.newest, published.records.last().cloned())
        };
        let now = self.hash_committed(None, &|_| ())?;
        let mut report = VerifyReport { blocks: now.0.iter().map(|s| s.len() as u64).sum(), ..VerifyReport::default() };
        let Some(record) = record else { return Ok(report) };
        if hex(now.root()) == record.facts().root {
            return Ok(report);
        }
        // Which blocks, if the file that says so can be believed.
        let known = self.published.read().baseline.as_ref().map(|b| (*b.table).clone());
        let known = match known {
            Some(known) => Some(known),
            None => self.stored_table().map(|(table, _)| table),
        };
        let Some(known) = known else {
            report.wrong.push(format!("the weights files do not hold commit {newest}"));
            return Ok(report);
        };
        for (shard, (known, now)) in self.layout.shards.iter().zip(known.0.iter().zip(&now.0)) {
            let wrong: Vec<usize> = (0..known.len()).filter(|&b| known[b] != now[b]).collect();
            if let Some(first) = wrong.first() {
                let count = wrong.len();
                report.wrong.push(format!(
                    "{}: {count} blocks are not those of commit {newest}, the first is {first}",
                    shard.name
                ));
            }
        }
        Ok(report)
    }

    fn verify_commit(&self, id: u64) -> Result<VerifyReport, CommitError> {
        let mut report = VerifyReport::default();
        let Some(record) = self.record(id)? else { return Ok(report) };
        let files = match record.files() {
            Err(e @ CommitError::Corrupt { .. }) => {
                report.wrong.push(e.to_string());
                return Ok(report);
            }
            other => other?,
        };
        let mut note = |checked: Result<(), CommitError>| match checked {
            Err(e @ CommitError::Corrupt { .. }) => {
                report.wrong.push(e.to_string());
                Ok(())
            }
            other => other,
        };
        note(files.xor.verify())?;
        note(files.values.verify())?;
        if let Some(facts) = &record.facts().optimizer {
            note(optimizer::read(&self.storage, &self.layout, facts).map(|_| ()))?;
        }
        let layers = {
            let published = self.published.read();
            layers(&published.records, published.state.folded, id)
        };
        let places = self.layout.shards.iter().enumerate().flat_map(|(s, shard)| {
            let changed = shard.tensors.iter().enumerate().filter(|(_, t)| record.has(&t.name));
            changed.map(move |(t, _)| (s, t)).collect::<Vec<_>>()
        });
        let places: Vec<(usize, usize)> = places.collect();
        report.tensors = places.len() as u64;
        let wrong: Vec<Option<String>> = places
            .into_par_iter()
            .map(|(s, t)| {
                let name = &self.layout.shards[s].tensors[t].name;
                match recover::hash_tensor(self, s, t, &layers) {
                    Ok(found) if Some(found) == files.xor.checksum(name) => Ok(None),
                    Ok(_) => {
                        Ok(Some(format!("tensor '{name}' as of commit {id} has another checksum than its record says")))
                    }
                    Err(e @ CommitError::Corrupt { .. }) => Ok(Some(e.to_string())),
                    Err(e) => Err(e),
                }
            })
            .collect::<Result<_, CommitError>>()?;
        report.wrong.extend(wrong.into_iter().flatten());
        Ok(report)
    }
}
