#!/bin/sh
# Ask a running server with curl: the same question through both APIs, then a stream, line by line.
#
#   glmexport serve int4/ &
#   sh examples/ask_curl.sh http://127.0.0.1:11434 int4 "12+34="
set -eu
address=$1 model=$2 question=$3

curl -sSf "$address/api/generate" -d '{
  "model": "'"$model"'", "prompt": "'"$question"'", "stream": false, "options": {"temperature": 0}
}'
echo
curl -sSf "$address/v1/chat/completions" -H "Authorization: Bearer ${GLMEXPORT_API_KEY:-none}" -d '{
  "model": "'"$model"'", "messages": [{"role": "user", "content": "'"$question"'"}], "temperature": 0
}'
echo
curl -sSfN "$address/api/chat" -d '{
  "model": "'"$model"'", "messages": [{"role": "user", "content": "'"$question"'"}], "options": {"temperature": 0}
}'
