#!/usr/bin/env bash
# The complete path on real images: shard, autoencoder, latents, training on two ranks, samples, scores.
# `bash demo.sh` uses handwritten digits and writes demo/; `bash demo.sh emoji` uses colour pictures, demo/emoji/.
# A step whose result exists is skipped, so the same command continues where it was stopped.
set -euo pipefail

PATH="$(cd "${VENV:-.venv}/bin" && pwd):$PATH"
DEMO=${1:-digits}
case $DEMO in
  digits) OUT=demo STEPS=7 ;;
  emoji) OUT=demo/emoji STEPS=4 ;;
  *) echo "there is no demo $DEMO; give digits or emoji" >&2 && exit 2 ;;
esac
CONFIG=configs/${DEMO}_cpu.yaml
RUN=$OUT/runs/$DEMO
# Two ranks on CPU. On a machine with GPUs: one rank per GPU, at most two, with NCCL and bf16.
RANKS=$(python -c 'import torch; print(min(torch.cuda.device_count(), 2) or 2)')
number=0
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}"

step() { # step NAME DONE_FILE COMMAND...
  number=$((number + 1))
  printf '\n[%d/%d] %s (%dm%02ds so far)\n' "$number" "$STEPS" "$1" $((SECONDS / 60)) $((SECONDS % 60))
  if [ -e "$2" ]; then
    echo "already exists: $2"
    return
  fi
  local began=$SECONDS
  echo "\$ ${*:3}"
  "${@:3}"
  printf '%s took %ds\n' "$1" $((SECONDS - began))
  printf '%s\t%d\n' "$1" $((SECONDS - began)) >>$OUT/seconds.tsv
}

digits() {
  step "image shards" $OUT/images/heldout/manifest.json \
    ecar-data shard digits $OUT/images --holdout 0.2
  step "autoencoder" $OUT/vae/config.json \
    ecar-data train-vae $OUT/images/train $OUT/vae --latent-channels 2
  step "latent shards" $OUT/latents/000000.json \
    ecar-data encode $OUT/images/train $OUT/latents --vae $OUT/vae --image-size 32
  step "manifest" $OUT/latents/manifest.json \
    ecar-data finalize $OUT/latents
  # The held-out digits too, for the validation loss.
  if [ ! -e $OUT/heldout_latents/manifest.json ]; then
    ecar-data encode $OUT/images/heldout $OUT/heldout_latents --vae $OUT/vae --image-size 32
    ecar-data finalize $OUT/heldout_latents
  fi
  step "training" $RUN/scores.json \
    env OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node "$RANKS" -m ecar_dist train $CONFIG \
    data.heldout_latents=$OUT/heldout_latents train.validate_every_samples=9_600
  step "samples" $OUT/samples/stages.png \
    ecar-dist sample $RUN --out $OUT/samples --count 80
  step "scores" $RUN/scores.json \
    ecar-dist evaluate $RUN
}

# Pictures of Twemoji, by Twitter and other contributors, CC-BY 4.0.
emoji() {
  step "shards, autoencoder, latents" $OUT/heldout_latents/manifest.json \
    ecar-data prepare emoji-plain $OUT --vae train --vae-channels 8 --vae-steps 600 --image-size 32
  step "training" $RUN/scores.json \
    env OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node "$RANKS" -m ecar_dist train $CONFIG
  step "samples" $OUT/samples/stages.png \
    ecar-dist sample $RUN --out $OUT/samples --count 88
  step "scores" $RUN/scores.json \
    ecar-dist evaluate $RUN --neighbours $OUT/samples/neighbours.png
}

"$DEMO"

# The numbers that the documentation quotes. docs/demo_result.json is this file after a full run on the digits, and
# docs/demo_emoji_result.json after one on the emoji (tests/test_docs.py).
python - $RUN $OUT >$OUT/result.json <<'PYTHON'
import csv, datetime, json, os, platform, sys
from importlib.metadata import version
from pathlib import Path

run, out = (Path(word) for word in sys.argv[1:])
steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
cpu = next((line.partition(": ")[2].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), "")
vae = json.loads((out / "vae/config.json").read_text())
result = {
    "date": datetime.date.today().isoformat(),
    "machine": f"{os.cpu_count()} cores of {cpu or platform.machine()}",
    "versions": {name: version(name) for name in ("torch", "deepspeed", "numpy", "scikit-learn")},
    "seconds": {name: int(taken) for name, taken in csv.reader(open(out / "seconds.tsv"), delimiter="\t")},
    "dataset_id": json.loads((out / "latents/manifest.json").read_text())["dataset_id"],
    "autoencoder": {name: vae[name] for name in ("scaling_factor", "shift_factor")},
    "losses": {str(step["step"]): step["train/loss"] for step in steps},
    "scores": json.loads((run / "scores.json").read_text()),
}
print(json.dumps(result, indent=1))
PYTHON

cat <<TEXT

$(grep -E '"(FD-|ratio|class accuracy)' $RUN/scores.json)

done in $((SECONDS / 60))m$((SECONDS % 60))s
  pictures     $OUT/samples/grid.png (a column for each class), $OUT/samples/stages.png (coarse to fine)
  scores       $RUN/scores.json
  TensorBoard  ${VENV:-.venv}/bin/tensorboard --logdir $OUT/runs
TEXT
