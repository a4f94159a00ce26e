//! The engine dies, truncates its memory or deletes it, at every moment: readers get ESTALE and never bytes that are of no
//! step, the daemon lives, `status` says why, and unmount works. For all three ways of serving.

mod support;

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};
use support::engine::Life;
use support::*;

const STALE: Option<i32> = Some(libc::ESTALE);

struct Setup {
    model: Model,
    engine: Engine,
    mount: Mount,
    way: Way,
    _scratch: Scratch,
}

impl Setup {
    fn new(way: Way) -> Setup {
        let scratch = Scratch::new();
        let model = Model::sharded(scratch.join("model"));
        let engine = Engine::living(&model, scratch.join("engine.json"), Life::Child);
        let mut mounting = Mounting::of(&model, scratch.join("mnt")).engine(&engine).way(way);
        if way == Way::Copied {
            mounting = mounting.arg("--no-passthrough");
        }
        let mount = mounting.mount();
        mount.settled();
        Setup { model, engine, mount, way, _scratch: scratch }
    }

    /// All that is promised once the engine is gone.
    #[track_caller]
    fn is_gone(&self, why: &str) {
        let (mount, way) = (&self.mount, self.way);
        for i in 0..self.model.shards.len() {
            // Whoever joins readers of the step before is told within a second.
            until("opens fail", || errno(File::open(mount.shard(i))) == STALE);
        }
        until("the engine's end is noticed", || mount.state() == "failed");
        assert!(mount.fact("source_gone").unwrap().contains(why), "{way:?}: {:?}", mount.fact("source_gone"));
        for command in ["commit", "refresh", "freeze"] {
            assert_eq!(errno(mount.ctl(command)), STALE, "{way:?}: {command}");
        }
        // Everything else goes on.
        assert_eq!(
            std::fs::read(mount.path("config.json")).unwrap(),
            std::fs::read(self.model.path.join("config.json")).unwrap()
        );
        let size = std::fs::metadata(mount.shard(0)).unwrap().len();
        assert_eq!(size, std::fs::metadata(self.model.shard(0)).unwrap().len());
        assert!(mount.is_running(), "{way:?}: the daemon lives");
        mount.umount();
        mount.ends();
        assert!(!mount.is_mounted());
    }
}

#[test]
fn when_the_engine_dies_opens_and_commands_fail_and_unmount_works() {
    for way in [Way::Passthrough, Way::Copied, Way::Direct] {
        let mut setup = Setup::new(way);
        let disk = setup.model.disk();
        setup.engine.change_all(1);
        setup.engine.kill();
        setup.is_gone("ended");
        model::assert_same("the disk", &setup.model.disk(), &disk);
    }
}

#[test]
fn when_a_memory_is_truncated_opens_and_commands_fail_and_the_daemon_lives() {
    for way in [Way::Passthrough, Way::Copied, Way::Direct] {
        for memory in [0, 1] {
            let setup = Setup::new(way);
            let file = File::options().write(true).open(setup.engine.memory(memory)).unwrap();
            file.set_len(if memory == 0 { 0 } else { 4096 }).unwrap();
            setup.is_gone("truncated");
        }
    }
}

#[test]
fn when_a_memory_is_deleted_opens_and_commands_fail_and_the_daemon_lives() {
    for way in [Way::Passthrough, Way::Copied, Way::Direct] {
        let setup = Setup::new(way);
        std::fs::remove_file(setup.engine.memory(1)).unwrap();
        setup.is_gone("deleted");
    }
}

#[test]
fn files_that_are_open_fail_as_well_unless_the_kernel_has_a_whole_copy_of_them() {
    for way in [Way::Passthrough, Way::Copied, Way::Direct] {
        let mut setup = Setup::new(way);
        setup.engine.change_all(1);
        let live = setup.engine.expected(&setup.model);
        let files: Vec<File> = (0..live.len()).map(|i| setup.mount.open(i)).collect();
        let mut half = vec![0; 5000];
        files[0].read_exact_at(&mut half, 0).unwrap();
        assert_eq!(half, live[0][..5000]);
        setup.engine.kill();
        until("the engine's end is noticed", || setup.mount.state() == "failed");
        for (mut file, live) in files.into_iter().zip(&live) {
            if way == Way::Passthrough {
                let mut bytes = Vec::new();
                file.read_to_end(&mut bytes).unwrap();
                assert_eq!(&bytes, live, "the whole of the step that was held");
            } else {
                // The kernel may drop its pages a moment after `status` says so.
                until("reads of open files fail", || errno(file.read_at(&mut [0; 4096], 0)) == STALE);
                assert_eq!(errno(file.read_at(&mut [0; 4096], 4096)), STALE, "{way:?}");
            }
        }
        setup.is_gone("ended");
    }
}

#[test]
fn a_truncation_under_readers_never_shows_them_bytes_that_are_of_no_step() {
    for way in [Way::Copied, Way::Direct] {
        let mut setup = Setup::new(way);
        setup.engine.change_all(1);
        let live = setup.engine.expected(&setup.model);
        let (mount, begun) = (&setup.mount, AtomicBool::new(false));
        std::thread::scope(|scope| {
            let readers: Vec<_> = (0..2)
                .map(|_| {
                    let (live, begun) = (&live, &begun);
                    scope.spawn(move || {
                        loop {
                            for (i, live) in live.iter().enumerate() {
                                match std::fs::read(mount.shard(i)) {
                                    Ok(bytes) => assert!(bytes == *live, "{way:?}: weights file {i} has foreign bytes"),
                                    Err(e) => return e.raw_os_error(),
                                }
                                begun.store(true, Ordering::Release);
                            }
                        }
                    })
                })
                .collect();
            until("readers read", || begun.load(Ordering::Acquire));
            File::options().write(true).open(setup.engine.memory(0)).unwrap().set_len(0).unwrap();
            for reader in readers {
                assert_eq!(reader.join().unwrap(), STALE, "{way:?}");
            }
        });
        setup.is_gone("truncated");
    }
}

#[test]
fn an_engine_that_dies_in_the_middle_of_a_step_takes_that_step_with_it() {
    for way in [Way::Passthrough, Way::Copied, Way::Direct] {
        let mut setup = Setup::new(way);
        setup.engine.change_all(1);
        let whole = setup.engine.expected(&setup.model);
        let disk = setup.model.disk();
        let held = setup.mount.open(0);
        let mut bytes = vec![0; whole[0].len()];
        setup.engine.step(|engine| {
            engine.set(support::model::Q, 0, 77.0);
            engine.set(support::model::EMBED, 9, 78.0);
            // Its lock goes with it.
            engine.kill();
        });
        match held.read_exact_at(&mut bytes, 0) {
            Ok(()) => assert!(bytes == whole[0], "{way:?}: half a step was shown"),
            Err(e) => assert_eq!(e.raw_os_error(), STALE, "{way:?}"),
        }
        drop(held);
        until("opens fail", || match std::fs::read(setup.mount.shard(0)) {
            Ok(bytes) => {
                assert!(bytes == whole[0], "{way:?}: half a step was shown");
                false
            }
            Err(e) => e.raw_os_error() == STALE,
        });
        setup.is_gone("ended");
        model::assert_same("the disk", &setup.model.disk(), &disk);
    }
}

#[test]
fn a_mount_of_a_new_engine_follows_the_one_that_died() {
    let mut setup = Setup::new(Way::Passthrough);
    setup.engine.change_all(1);
    setup.engine.kill();
    until("the engine's end is noticed", || setup.mount.state() == "failed");
    setup.mount.umount();
    setup.mount.ends();
    // It loads the files again, as an engine that was restarted does.
    let mut engine = Engine::living(&setup.model, setup._scratch.join("engine.json"), Life::Child);
    let mount = Mounting::of(&setup.model, &setup.mount.point).engine(&engine).mount();
    model::assert_same("the new mount", &mount.weights(), &setup.model.disk());
    engine.change_all(2);
    model::assert_same("the new mount", &mount.weights(), &engine.expected(&setup.model));
}
