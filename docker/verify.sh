#!/usr/bin/env bash
# Builds docker/Dockerfile.cpu with buildah and tries what it promises: any user, no compiler, no tests, no checkout,
# a health check, a default policy, an answer. Needs root, buildah and debootstrap, no image registry and no daemon.
#
#     docker/verify.sh [WORK_FOLDER]    about 10 GB; a folder of an earlier run keeps its base
#
# A Debian base made by debootstrap stands in for python:3.11-slim-bookworm. chroot isolation and vfs storage work where
# neither namespaces nor overlay mounts may be used. BUILD_OPTIONS are given to `buildah build` as they are, for example
# "--volume /etc/ssl/certs:/etc/ssl/certs:ro --env PIP_FIND_LINKS=/wheels". PORT (default: 8000) must be free.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

work=$(realpath -m "${1:-$(mktemp -d)}")
port=${PORT:-8000}
export BUILDAH_ISOLATION=chroot STORAGE_DRIVER=vfs
mkdir -p "$work"
buildah() { command buildah --root "$work/storage" --runroot "$work/run" "$@"; }
inside() { buildah run --user "$user" "$container" -- "$@"; }
setting() { buildah inspect --type image --format "{{.Docker.Config.$1}}" "$image"; }
fail() { echo "verify: failed: $*" >&2; exit 1; }
step() { echo "==> $*"; }

base=localhost/kvserve-base image=localhost/kvserve-cpu user=12345:23456
if ! buildah inspect --type image $base >/dev/null 2>&1; then
    step "a Debian base"
    debootstrap --variant=minbase --include=ca-certificates,python3,python3-dev,python3-pip,python3-venv \
        bookworm "$work/base" >"$work/debootstrap.log"
    scratch=$(buildah from scratch)
    buildah add --quiet "$scratch" "$work/base" / >/dev/null
    buildah commit --quiet --rm "$scratch" $base >/dev/null
    rm -rf "$work/base"
fi

step "building docker/Dockerfile.cpu"
# shellcheck disable=SC2086 (several options in one variable)
buildah build --format docker --pull-never --build-arg BASE=$base --file docker/Dockerfile.cpu --tag $image \
    ${BUILD_OPTIONS:-} . >"$work/build.log" 2>&1 || { tail -20 "$work/build.log" >&2; fail "the build"; }

step "its settings"
[ "$(setting Entrypoint)" = "[kvserve serve]" ] || fail "entry point $(setting Entrypoint)"
[ "$(setting User)" = 1000:1000 ] || fail "user $(setting User)"
setting Healthcheck.Test | grep -q 127.0.0.1:8000/health || fail "no health check"
setting Env | grep -q KVSERVE_POLICY=boost-2bit || fail "no default policy"

container=$(buildah from --pull-never $image)
server=
trap '[ -z "$server" ] || kill "$server" 2>/dev/null; wait; buildah rm "$container" >/dev/null' EXIT

step "what user $user finds"
for tool in g++ pytest ruff mypy; do
    if inside sh -c "command -v $tool" >/dev/null 2>&1; then fail "$tool is in the image"; fi
done
inside sh -c 'touch "$HOME/written" "$KVSERVE_CACHE/written"' || fail "HOME or the cache is not writable"
place=$(inside python3 -c 'import kvserve; print(*kvserve.__path__)')
[[ $place == /opt/kvserve/lib/* ]] || fail "kvserve comes from $place"
refusal=$(inside kvserve serve --model /nowhere 2>&1) && fail "a missing model is served"
[[ $refusal == *"/nowhere does not exist"* ]] || fail "it said: $refusal"

step "serving"  # for a quarter of an hour at the most: ending buildah does not end what runs inside
inside timeout --kill-after=30 900 kvserve serve --host 127.0.0.1 --port "$port" --kv-cache-memory-bytes 67108864 --max-model-len 2048 \
    >"$work/server.log" 2>&1 &
server=$!
probe="import urllib.request; urllib.request.urlopen('http://127.0.0.1:$port/health', timeout=4)"
until inside python3 -c "$probe" 2>/dev/null; do
    kill -0 "$server" 2>/dev/null || { tail -20 "$work/server.log" >&2; fail "the server ended"; }
    sleep 3
done
question='What is the capital of France? Answer in one sentence.'
answer=$(curl --silent --show-error "http://127.0.0.1:$port/v1/chat/completions" -H 'Content-Type: application/json' \
    -d '{"model": "smollm2-135m-instruct", "messages": [{"role": "user", "content": "'"$question"'"}]}')
[[ $answer == *Paris* ]] || fail "it answered: $answer"
[[ $(<"$work/server.log") == *"policy boost-2bit"* ]] || fail "another policy is served"
echo "verify: all as promised; built on a stand-in for the base image"
