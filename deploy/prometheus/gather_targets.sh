#!/bin/sh
# Copies the targets.json of every run folder below RUNS to OUT, where Prometheus looks for them, and takes away
# the copies of those that are gone. Once, or every SECONDS.
#
#   gather_targets.sh RUNS OUT [SECONDS]
#
# RUNS holds run folders, or folders of run folders. OUT must be of this script's own: other *.json files in it
# are removed.
set -eu

if [ $# -lt 2 ]; then
    echo "usage: $0 RUNS OUT [SECONDS]" >&2
    exit 2
fi
runs=${1%/}
out=${2%/}
seconds=${3:-}
if [ ! -d "$runs" ] || [ ! -d "$out" ] || [ ! -w "$out" ]; then
    echo "$0: $runs and $out must be folders, and $out must be writable" >&2
    exit 2
fi

gather() {
    kept=" "
    for file in "$runs"/targets.json "$runs"/*/targets.json "$runs"/*/*/targets.json; do
        [ -f "$file" ] || continue
        sum=$(printf '%s' "$file" | cksum)
        name=${sum%% *}.json
        # written beside and renamed, so that no half file is ever read; left alone while it is the same
        if ! cmp -s "$file" "$out/$name"; then
            if ! { cp "$file" "$out/.$name" && chmod 644 "$out/.$name" && mv "$out/.$name" "$out/$name"; }; then
                rm -f "$out/.$name"
                [ -f "$file" ] || continue # the job signed off meanwhile
                echo "$0: $file cannot be copied" >&2
            fi
        fi
        kept="$kept$name "
    done
    for copy in "$out"/*.json; do
        case "$kept" in
            *" ${copy##*/} "*) ;;
            *) rm -f "$copy" ;;
        esac
    done
}

gather
while [ -n "$seconds" ]; do
    sleep "$seconds"
    gather
done
