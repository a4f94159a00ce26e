"""Tiny checkpoints of several families, each with merged, transposed, padded, cast and absent tensors, on one rank and two:
mounted bytes, a changed step, the commit. usage: families.py MODEL_DIR… (each a checkpoint directory; needs numpy)"""
import sys
import tempfile

from harness import EngineProcess, changed_blocks, check, copy_model, ctl, mounted, same, status, weightfs


def one(source, ranks, view):
    with tempfile.TemporaryDirectory() as scratch:
        model, before, want = copy_model(source, f"{scratch}/model"), f"{scratch}/before", f"{scratch}/want"
        copy_model(source, before)
        engine = EngineProcess(model, scratch, ranks)
        try:
            label = f"{source.rstrip('/').rpartition('/')[2]}, {ranks} rank(s), {view}"
            diagnosis = weightfs("diagnose", model, *engine.weights).stdout.splitlines()[0].split()
            check(f"{label}: diagnose matches {engine.facts['live']} live tensors", int(diagnosis[-1]) == engine.facts["live"])
            with mounted(model, f"{scratch}/mnt", "--view", view, *engine.weights) as mnt:
                check(f"{label}: {status(mnt)['view']['served']}: the mount equals the disk", same(mnt, model))
                engine.tell("change", 1, 0.01)
                engine.tell("expect", want)
                check(f"{label}: the mount shows the change", same(mnt, want))
                check(f"{label}: the disk does not", same(model, before))
                ctl(mnt, "commit")
                check(f"{label}: after the commit the disk does", same(model, want))
                check(f"{label}: {changed_blocks(before, model)} blocks changed", changed_blocks(before, model) > 0)
                ctl(mnt, "commit")
                check(f"{label}: a second commit changes nothing", same(model, want))
        finally:
            engine.stop()


if __name__ == "__main__":
    for source in sys.argv[1:]:
        for ranks in (1, 2):
            for view in ("held", "live"):
                one(source, ranks, view)
