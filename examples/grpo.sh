#!/bin/sh
# Learn from rewards with nothing but curl: sh examples/grpo.sh [MODEL [STEPS]]
# The model is taught to begin its answers with "red". Needs a running server (arbor-serve) with arbor-grpo.
# ARBOR_URL and OPENAI_API_KEY are respected.
set -eu
model=${1:-tiny}
steps=${2:-3}
url=${ARBOR_URL:-http://127.0.0.1:7453}/v1
key="Authorization: Bearer ${OPENAI_API_KEY:-unused}"

# field NAME: the first value of that name in the JSON on standard input, text or number.
field() { tr -d '\n' | grep -oE '"'"$1"'": *("[^"]*"|[0-9]+)' | head -n 1 | sed 's/^[^:]*: *//; s/"//g'; }
post() { curl --silent --show-error --fail-with-body --header "$key" --header "Content-Type: application/json" "$@"; }
grpo() { path=$1; shift; post "$url/fine_tuning/grpo/$path" "$@"; }
ask='"messages": [{"role": "user", "content": "red green blue"}], "max_tokens": 16'

job=$(grpo initialize --data '{"model": "'"$model"'", "num_generations": 8, "max_staleness": 0}' | field job_id)
echo "Created $job"

step=1
while [ "$step" -le "$steps" ]; do
    # Eight answers of the newest policy; each is worth 1 if it begins as wanted.
    answer=$(post "$url/chat/completions" --data '{"model": "'"$job"'", "n": 8, "seed": '"$step"', '"$ask"'}')
    id=$(printf %s "$answer" | field id)
    rewards=$(printf %s "$answer" | grep -oE '"content": *"([^"\\]|\\.)*"' | {
        index=0
        while read -r line; do
            case $line in *'"red'*) reward=1 ;; *) reward=0 ;; esac
            printf '%s{"completion_id": "%s", "index": %d, "reward": %d}' "${comma:-}" "$id" "$index" "$reward"
            index=$((index + 1)) comma=,
        done
    })
    # The same name again would change nothing: the request may be repeated if its answer is lost.
    grpo rewards --data '{"job_id": "'"$job"'", "group": "step-'"$step"'", "rewards": ['"$rewards"']}' >/dev/null
    until [ "$(grpo status --data '{"job_id": "'"$job"'"}' | field policy_version)" -ge "$step" ]; do
        case $(grpo status --data '{"job_id": "'"$job"'"}' | field status) in
            failed | cancelled) echo "The job has ended"; exit 1 ;;
        esac
        sleep 1
    done
    echo "Step $step: $(printf %s "$rewards" | grep -o '"reward": 1' | grep -c .) of 8"
    step=$((step + 1))
done

grpo checkpoint --data '{"job_id": "'"$job"'", "checkpoint_name": "taught"}' >/dev/null
grpo terminate --data '{"job_id": "'"$job"'"}' | field status
post "$url/chat/completions" --data '{"model": "'"$job"'", '"$ask"'}'
