//! An engine that was restarted takes its place behind the mount: by its new manifest under the old path, or by `attach`.
//! Another model's is refused. For all three ways of serving.

mod support;

use std::fs::File;
use support::engine::Life;
use support::*;

const STALE: Option<i32> = Some(libc::ESTALE);

fn mounted(scratch: &Scratch, model: &Model, engine: &Engine, way: Way) -> Mount {
    let mut mounting = Mounting::of(model, scratch.join("mnt")).engine(engine).way(way);
    if way == Way::Copied {
        mounting = mounting.arg("--no-passthrough");
    }
    let mount = mounting.mount();
    mount.settled();
    mount
}

#[test]
fn a_restarted_engine_is_picked_up_by_its_new_manifest() {
    for way in [Way::Passthrough, Way::Copied, Way::Direct] {
        let scratch = Scratch::new();
        let model = Model::sharded(scratch.join("model"));
        let mut first = Engine::living(&model, scratch.join("engine.json"), Life::Child);
        let mount = mounted(&scratch, &model, &first, way);
        first.kill();
        until("the engine's end is noticed", || mount.state() == "failed");
        assert_eq!(errno(File::open(mount.shard(0))), STALE);

        let mut second = Engine::living(&model, scratch.join("engine.json"), Life::Child);
        second.change_all(3);
        until("the new engine is attached to", || mount.state() == "idle");
        assert_eq!(mount.fact("source_gone"), None, "{way:?}");
        assert!(mount.fact("source").unwrap().contains(&second.pid().to_string()), "{way:?}");
        mount.does("refresh");
        model::assert_same("the new engine's weights", &mount.weights(), &second.expected(&model));
        mount.does("commit");
        model::assert_same("committed", &model.disk(), &second.expected(&model));
        second.kill();
        until("its end is noticed as well", || mount.state() == "failed");
    }
}

#[test]
fn attach_takes_the_path_that_its_writer_means() {
    let scratch = Scratch::new();
    let model = Model::sharded(scratch.join("model"));
    let first = Engine::living(&model, scratch.join("first.json"), Life::Child);
    let mount = mounted(&scratch, &model, &first, Way::Passthrough);
    let mut second = Engine::living(&model, scratch.join("second.json"), Life::Child);
    second.change_all(5);
    // While the first still runs.
    let says = mount.does(&format!("attach {}", scratch.join("second.json").display()));
    assert!(says.contains(&second.pid().to_string()), "{says}");
    model::assert_same("the other engine's weights", &mount.weights(), &second.expected(&model));
    let done = std::process::Command::new("sh")
        .args(["-c", &format!("echo attach first.json > {}", mount.path("ctl").display())])
        .current_dir(scratch.path())
        .status()
        .unwrap();
    assert!(done.success(), "{}", mount.says());
    model::assert_same("the first engine's weights", &mount.weights(), &first.expected(&model));
}

#[test]
fn what_cannot_be_attached_to_is_refused_and_changes_nothing() {
    let scratch = Scratch::new();
    let model = Model::sharded(scratch.join("model"));
    let engine = Engine::living(&model, scratch.join("engine.json"), Life::Child);
    let mount = mounted(&scratch, &model, &engine, Way::Passthrough);
    let other = Model::sharded_of(scratch.join("other"), 24);
    let others = Engine::living(&other, scratch.join("other.json"), Life::Child);
    let refused = |command: &str| errno(mount.ctl(command));
    assert_eq!(refused(&format!("attach {}", scratch.join("other.json").display())), Some(libc::EINVAL));
    assert_eq!(refused(&format!("attach {}", scratch.join("none.json").display())), Some(libc::ENOENT));
    // One that has lost a tensor.
    let mut less = others.description(&other, None);
    let text = std::fs::read_to_string(scratch.join("engine.json")).unwrap();
    less.clone_from(&serde_json::from_str(&text).unwrap());
    let name = less["tensors"].as_object().unwrap().keys().next().unwrap().clone();
    less["tensors"].as_object_mut().unwrap().remove(&name);
    support::engine::publish(&scratch.join("less.json"), &less);
    assert_eq!(refused(&format!("attach {}", scratch.join("less.json").display())), Some(libc::EINVAL));
    assert!(mount.says().contains(&name), "{}", mount.says());
    mount.does("freeze");
    assert_eq!(refused("attach"), Some(libc::EBUSY));
    mount.does("thaw");
    mount.does("attach");
    model::assert_same("still its engine's", &mount.weights(), &engine.expected(&model));

    let own = Mounting::of(&other, scratch.join("own")).mount();
    assert_eq!(errno(own.ctl("attach")), Some(libc::EINVAL));
}

#[test]
fn a_wrong_successor_is_said_once_and_the_right_one_is_taken_later() {
    let scratch = Scratch::new();
    let model = Model::sharded(scratch.join("model"));
    let other = Model::sharded_of(scratch.join("other"), 24);
    let mut first = Engine::living(&model, scratch.join("engine.json"), Life::Child);
    let mount = mounted(&scratch, &model, &first, Way::Passthrough);
    first.kill();
    until("the engine's end is noticed", || mount.state() == "failed");
    let _wrong = Engine::living(&other, scratch.join("engine.json"), Life::Child);
    until("the wrong one is refused", || mount.fact("last_error").unwrap().contains("does not fit"));
    assert_eq!(mount.state(), "failed");
    let right = Engine::living(&model, scratch.join("engine.json"), Life::Child);
    until("the right one is attached to", || mount.state() == "idle");
    model::assert_same("its weights", &mount.weights(), &right.expected(&model));
}
