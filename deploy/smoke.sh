#!/usr/bin/env bash
# Builds the images, starts the stack of docker-compose.yml, and finds out whether it does what it should: it
# becomes healthy and answers, comes back after `kill -9` of each container, and starts and stops in the order
# of a pod without losing a request. What was seen goes to benchmarks/results/containers.json.
#
#   deploy/smoke.sh [--no-build]
#
# Needs a Docker engine with Compose (1.29, or 2) and what `make test` sets up. HIPRUNE_BUILD_NETWORK=host
# builds where containers reach the package index by the host's network alone. Leaves nothing running.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

docker info >/dev/null 2>&1 || { echo "smoke: no Docker engine answers" >&2; exit 1; }
[ -x .venv/bin/python ] || { echo "smoke: run \`make test\` first, which sets up .venv" >&2; exit 1; }
exec .venv/bin/python -m benchmarks.containers "$@"
