#!/bin/sh
# Holds the rules against promtool, which comes with Prometheus: their syntax, and when each alert fires.
set -eu
cd "$(dirname "$0")"
promtool check config prometheus.yaml
promtool check rules alerts.yaml
promtool test rules alerts_test.yaml
