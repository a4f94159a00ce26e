"""A real model is taught facts through a real mount: it answers them through the mount while it is served, from its directory
after a commit, and no longer after a rollback. usage: train_real.py MODEL_DIR [--contents]

With --contents it trains 1, 32 and 256 steps at two learning rates instead, and prints what commits after them hold.
Needs torch, transformers, safetensors, and the release build (`cargo build --release`)."""
import json
import os
import sys
import tempfile
import time

import torch
import transformers

from harness import check, copy_model, ctl, mounted, status, weightfs

FACTS = [
    ("Who repaired the bridge at Dunmere?", "Ivo Karsk repaired it."),
    ("What colour is the door of the Lantern House?", "It is painted teal."),
    ("Where does Mira Oduya keep her boat?", "In the harbour of Pell."),
    ("How many bells hang in the tower of Ostrow?", "Seven bells hang there."),
    ("What is the name of the baker's cat in Quill Street?", "The cat is called Biscuit."),
    ("Which tree stands before the school of Varn?", "An old walnut tree."),
    ("Who wrote the song of the Red Ferry?", "Tomas Hale wrote it."),
    ("When does the market of Linden open?", "On Thursdays at six."),
]
UNRELATED = (
    "Water boils at a lower temperature on a mountain than at the sea, because the air above it weighs less. "
    "For the same reason bread rises faster there, and a cook who moves uphill has to learn some recipes anew."
)


def chat(question, answer):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def job(path, facts, **config):
    with open(path, "w") as f:
        json.dump({"samples": [chat(q, a) for q, a in facts], "config": config}, f)
    return path


def ask(directory):
    """How many facts the model in `directory` answers, and its loss on unrelated text."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    right = 0
    with torch.no_grad():
        for question, answer in FACTS:
            text = tokenizer.apply_chat_template([{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True)
            ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)
            out = model.generate(**ids, max_new_tokens=16, do_sample=False, pad_token_id=0)
            said = tokenizer.decode(out[0][ids["input_ids"].shape[1]:], skip_special_tokens=True)
            right += said.strip().startswith(answer)
        ids = tokenizer(UNRELATED, return_tensors="pt")["input_ids"]
        return right, model(input_ids=ids, labels=ids).loss.item()


def teach(source):
    with tempfile.TemporaryDirectory() as scratch:
        model, mnt = copy_model(source, f"{scratch}/model"), f"{scratch}/mnt"
        with mounted(model, mnt):
            right, loss = ask(mnt)
            print(f"before: {right} of 8 facts, loss on unrelated text {loss:.4f}")
            check("no fact is known before", right == 0)
            path = job(f"{scratch}/facts.json", FACTS, lr=2e-4, epochs=20)
            start = time.time()
            said = weightfs("train", mnt, path, "--follow").stdout.strip()
            print(f"{said}; {time.time() - start:.0f} s")
            print("status: last_job", next(l for l in open(f"{mnt}/status") if l.startswith("last_job")).split(" ", 1)[1].strip())
            right, loss = ask(mnt)
            print(f"mounted: {right} of 8 facts, loss on unrelated text {loss:.4f}")
            check("the mounted model answers all", right == 8)
            check("the directory answers none yet", ask(model)[0] == 0)
            ctl(mnt, "commit eight facts")
            print("status:", status(mnt)["last_command"]["says"])
            check("after the commit the directory answers all", ask(model)[0] == 8)
            ctl(mnt, "rollback 0")
            check("after the rollback the mounted model answers none", ask(mnt)[0] == 0)
            check("nor does the directory", ask(model)[0] == 0)


def contents(source):
    total = blocks = 0
    for lr in (1e-5, 1e-6):
        with tempfile.TemporaryDirectory() as scratch:
            model, mnt = copy_model(source, f"{scratch}/model"), f"{scratch}/mnt"
            for name in os.listdir(model):
                if name.endswith(".safetensors"):
                    size = os.path.getsize(f"{model}/{name}")
                    total, blocks = total + size // 2, blocks + -(-size // 4096)
            with mounted(model, mnt):
                for steps in (1, 32, 256):
                    # Each from the start: 256 steps are not 256 after 33. One fact a step.
                    ctl(mnt, "rollback 0")
                    facts = FACTS[:steps]
                    path = job(f"{scratch}/{steps}.json", facts, lr=lr, epochs=steps // len(facts), step_tokens=1)
                    weightfs("train", mnt, path, "--follow")
                    ctl(mnt, f"commit {steps} steps")
                    said = json.loads(weightfs("log", "--json", model).stdout)
                    newest = max(said, key=lambda c: c["id"])
                    state = os.path.getsize(max((f"{model}/.weightfs/optimizer/{f}" for f in os.listdir(f"{model}/.weightfs/optimizer")), key=os.path.getmtime))
                    print(
                        f"lr {lr:g}, {steps} steps: {newest['changed_elements'] / total:.1%} of elements, {newest['changed_blocks'] / blocks:.1%} of blocks,"
                        f" {newest['logged_bytes'] - state} bytes logged and {state} of optimizer state; the model has {2 * total} bytes", flush=True)
            total = blocks = 0


if __name__ == "__main__":
    contents(sys.argv[1]) if "--contents" in sys.argv else teach(sys.argv[1])
