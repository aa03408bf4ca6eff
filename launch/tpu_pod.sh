#!/usr/bin/env bash
# One training run on all hosts of a Cloud TPU slice, from the repository's root:
#   TPU=my-slice ZONE=us-east5-a launch/tpu_pod.sh --config=configs/wmt14.py:en_de_big --workdir=gs://BUCKET/runs/big \
#     --config.model.dtype=bfloat16
# It copies the last commit to each host, sets up .venv there once, and starts the same command on all of them;
# JAX learns of the other hosts from the TPU's own metadata. COMMAND is train.py by default, or eval.py. DATA_DIR names
# the folder of prepared data: gs://BUCKET/data, which `python -m transformer.prepare` fills on one machine, or a disk that
# all hosts have mounted; by default each host prepares all of it by itself. CACHE_DIR names that of compiled programs, such as gs://BUCKET/compiled: host 0
# writes them, all read them. Before a host is taken away it gets SIGTERM: all save and stop with exit code 143, and the
# same command goes on. Ctrl-C ends this command alone; to stop the trainers:
#   gcloud compute tpus tpu-vm ssh $TPU --zone=$ZONE --worker=all --command="pkill -TERM -f train.py"
set -euo pipefail
: "${TPU:?name of the TPU VM}" "${ZONE:?its zone}"
on_all=(gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all)

bundle=$(mktemp -d)/code.tar.gz
git archive --format=tar.gz -o "$bundle" HEAD
gcloud compute tpus tpu-vm scp "$bundle" "$TPU:code.tar.gz" --zone="$ZONE" --worker=all
"${on_all[@]}" --command="mkdir -p transformer && tar -xzf code.tar.gz -C transformer && cd transformer && \
make .venv/installedtpu ACCELERATOR=tpu PYTHON=${PYTHON:-python3} && .venv/bin/pip install --quiet gcsfs"

"${on_all[@]}" --command="cd transformer && TFDS_DATA_DIR=${DATA_DIR:-\$HOME/tensorflow_datasets} \
${CACHE_DIR:+JAX_COMPILATION_CACHE_DIR=$CACHE_DIR }\
exec .venv/bin/python ${COMMAND:-train.py} $(printf '%q ' "$@")"
