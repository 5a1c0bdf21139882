#!/bin/sh
# Fine-tune and chat with nothing but curl: sh examples/curl.sh data.jsonl [MODEL]
# A model of random weights that has learned ten rows answers with any bytes: max_tokens keeps that short.
# Needs a running server (arbor-serve). ARBOR_URL and OPENAI_API_KEY are respected.
set -eu
data=$1
model=${2:-tiny}
url=${ARBOR_URL:-http://127.0.0.1:7453}/v1
key="Authorization: Bearer ${OPENAI_API_KEY:-unused}"

# field NAME: the first string of that name in the JSON on standard input.
field() { tr -d '\n' | sed -n 's/.*"'"$1"'": *"\([^"]*\)".*/\1/p'; }
get() { curl --silent --show-error --fail-with-body --header "$key" "$@"; }
post() { get --header "Content-Type: application/json" "$@"; }

file=$(get "$url/files" --form purpose=fine-tune --form "file=@$data" | sed 's/,.*//' | field id)
echo "Uploaded $file"
job=$(post "$url/fine_tuning/jobs" --data '{"model": "'"$model"'", "training_file": "'"$file"'"}' | sed 's/,.*//' | field id)
echo "Created $job"

status=queued
while [ "$status" != succeeded ]; do
    case $status in failed | cancelled) echo "The job $status"; exit 1 ;; esac
    sleep 1
    status=$(get "$url/fine_tuning/jobs/$job" | field status)
done
get "$url/fine_tuning/jobs/$job/events?limit=5"
echo

tuned=$(get "$url/fine_tuning/jobs/$job" | field fine_tuned_model)
post "$url/chat/completions" --data '{"model": "'"$tuned"'", "messages": [{"role": "user", "content": "Hello"}],
    "max_tokens": 16}'
echo
post --no-buffer "$url/chat/completions" \
    --data '{"model": "'"$tuned"'", "messages": [{"role": "user", "content": "Hello"}],
    "max_tokens": 16, "stream": true}'
