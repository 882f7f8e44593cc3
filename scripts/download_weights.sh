#!/usr/bin/env bash
# Fetch the trained adapter from the training server, then delete repository and dataset there; see --help.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=over_ssh.sh
. "$(dirname -- "${BASH_SOURCE[0]}")/over_ssh.sh"

usage() {
    cat <<'HELP'
Usage: download_weights.sh [--keep-remote] [--dry-run]

Fetches orion_lora_weights from the training server over ssh and checks the sha256 of every file against the server's
manifest (manifest.json). Then it replaces the local weights; the old ones stay as orion_lora_weights.previous. Finally
it deletes the repository and the dataset on the server. After an interruption, run the same command again to resume.

The script does not delete a folder that is not recognizably a checkout of ORION or one of its datasets, that is or
contains a home folder, that is reached through a link, or in which a process works. It does not delete a dataset with
files that upload_to_server.sh did not send, or a checkout with changes, commits or files that may exist nowhere else.
In a checkout may lie: the fetched weights, their run's checkpoints, logs and copy of the dataset, runs/training-job,
.venv and caches. Other runs, and a merged model or GGUF pair of the same run, are not fetched: they are refused.

  --keep-remote   delete nothing on the server
  --dry-run       print all commands without running them
  --help          print this text

SERVER                     the server: host or user@host
ORION_SERVER_HDD_PATH      folder on the server that upload_to_server.sh filled; used in the next three defaults
ORION_SERVER_REPO_PATH     the repository on the server, which is deleted (default: $ORION_REPO_DIR, or
                           $ORION_SERVER_HDD_PATH/orion-triage)
ORION_SERVER_DATA_PATH     the dataset on the server, which is deleted (default: $ORION_SERVER_HDD_PATH/orion_data)
ORION_SERVER_WEIGHTS_PATH  the weights on the server (default: runs/tiny/orion_lora_weights in the repository)
ORION_LOCAL_WEIGHTS_DIR    the local weights (default: orion_lora_weights)
ORION_SSH                  the ssh command with its options (default: ssh with keepalives); with a ControlMaster in
                           ~/.ssh/config, all steps share one login

Example: SERVER=me@gpu ORION_SERVER_HDD_PATH=/data/me ORION_LOCAL_WEIGHTS_DIR=runs/tiny/orion_lora_weights \
         scripts/download_weights.sh
HELP
}

keep=
while (($#)); do
    case $1 in
        --keep-remote) keep=yes ;;
        --dry-run) DRY_RUN=yes ;;
        --help | -h) usage && exit ;;
        *) misuse "there is no option '$1'." ;;
    esac
    shift
done

# --- what is to be fetched, and where to -----------------------------------------------------------------------

require_server
root=${ORION_SERVER_HDD_PATH:-}
repository=${ORION_SERVER_REPO_PATH:-${ORION_REPO_DIR:-${root:+$root/orion-triage}}}
data=${ORION_SERVER_DATA_PATH:-${root:+$root/orion_data}}
weights=${ORION_SERVER_WEIGHTS_PATH:-${repository:+$repository/runs/tiny/orion_lora_weights}}
[[ $keep && ! $repository ]] || require_server_path ORION_SERVER_REPO_PATH "$repository"
[[ $keep && ! $data ]] || require_server_path ORION_SERVER_DATA_PATH "$data"
require_server_path ORION_SERVER_WEIGHTS_PATH "$weights"
require_tools rsync sha256sum flock python3

target=${ORION_LOCAL_WEIGHTS_DIR:-orion_lora_weights}
[[ $target == /* ]] || target=$PWD/$target
target=${target%/}
name=${target##*/}
[[ $name && $name != . && $name != .. ]] ||
    fail "ORION_LOCAL_WEIGHTS_DIR=$target is not the name of a folder." \
        "Set it to a folder such as runs/tiny/orion_lora_weights."
for folder in "$target" "$target.previous"; do
    [[ ! -e $folder || -f $folder/manifest.json || -f $folder/adapter_config.json ]] ||
        fail "$folder exists and contains no weights." "Move it away, or correct ORION_LOCAL_WEIGHTS_DIR."
done
incoming=${target%/*}/.$name.incoming
pending=${target%/*}/.$name.cleanup # says that weights which are safe here are to be deleted there
old=${target%/*}/.$name.deleting

# --- steps -----------------------------------------------------------------------------------------------------

manifest_of() { # FOLDER: the sha256 of its manifest, or nothing
    [[ ! -f $1/manifest.json ]] || sha256sum <"$1/manifest.json" | cut -d ' ' -f 1
}

contents_of() { # FOLDER: one sha256 of all names and bytes in it, or nothing; on_server.sh has its twin
    [[ ! -d $1 ]] || (cd "$1" && find -L . -type f -exec sha256sum {} + | LC_ALL=C sort) | sha256sum | cut -d ' ' -f 1
}

verify() { # FOLDER: every file that the manifest names is there and has its sha256
    python3 -I - "$1" <<'PYTHON'
import hashlib, json, pathlib, sys

folder = pathlib.Path(sys.argv[1])
try:
    manifest = json.loads((folder / "manifest.json").read_bytes())
    stage, outputs = manifest["stage"], manifest["outputs"]
    if stage != "fine-tune" or "adapter_model.safetensors" not in outputs:
        sys.exit(f"manifest.json is the manifest of {stage}, not of a finished fine-tuning")
    faults = []
    for name, expected in outputs.items():
        path = folder / name
        if not path.resolve().is_relative_to(folder.resolve()):
            faults.append(f"{name} is outside the folder")
        elif not path.is_file():
            faults.append(f"{name} is missing")
        elif hashlib.sha256(path.read_bytes()).hexdigest() != expected:
            faults.append(f"{name} does not have the sha256 in the manifest")
except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
    sys.exit(f"manifest.json is damaged: {error!r}")
sys.exit("; ".join(faults) or 0)
PYTHON
}

swap() { # the verified weights take the old ones' place; those stay as TARGET.previous
    if [[ -e $target ]]; then
        [[ ! -e $target.previous ]] || run mv -T "$target.previous" "$old"
        run mv -T "$target" "$target.previous"
    fi
    run mv -T "$incoming" "$target"
}

note_cleanup() { # RECEIPT: written before the swap, so that no moment is without it
    printf '%s\n' "$1" "$SERVER" "$weights" "$repository" "$data" >"$pending.partial"
    mv -T "$pending.partial" "$pending"
}

# --- fetch -----------------------------------------------------------------------------------------------------

run mkdir -p "${target%/*}"
if [[ $DRY_RUN ]]; then
    there='SHA256_OF_WEIGHTS'
    on_server weights "$weights" "$repository" "$data" "$keep"
else
    exec 9<"${target%/*}"
    flock -n 9 || fail "another download to ${target%/*} is running." "Wait until it ends."
    trap 'say "interrupted: run the same command again to resume"; exit 130' INT TERM
    rm -rf "$old"
    there=$(on_server weights "$weights" "$repository" "$data" "$keep")
    there=${there#contents }
fi
here=
[[ $DRY_RUN ]] || here=$(manifest_of "$target")

if [[ $there == absent ]]; then
    # They are deleted there only after they were verified here.
    [[ -f $pending && $here && $(<"$pending") == "$(printf '%s\n' "$here" "$SERVER" "$weights" "$repository" "$data")" ]] ||
        fail "there are no weights in $weights on $SERVER." \
            "Train first ('orion remote train'), or correct ORION_SERVER_WEIGHTS_PATH."
    verified=$(contents_of "$target")
    complaint=$(verify "$target" 2>&1) || fail "the weights in $target are damaged: $complaint." \
        "Restore a copy, for example $target.previous: the weights on the server are already deleted."
    say "the weights are already in $target"
elif [[ $here && $(contents_of "$target") == "$there" ]] && verify "$target" 2>/dev/null; then
    verified=$there
    say "the weights are already in $target, and complete"
    [[ $keep ]] || note_cleanup "$here"
else
    verified=$there
    over_rsync -rtcL --delete -- "$SERVER:$weights/" "$incoming/"
    if [[ $DRY_RUN ]]; then
        printf '+ verify %q, which is:\n' "$incoming"
        declare -f verify | while IFS= read -r line; do printf '  | %s\n' "$line"; done
        swap
    else
        complaint=$(verify "$incoming" 2>&1) ||
            fail "the weights on the server are incomplete or damaged (nothing was deleted): $complaint." \
                "Train again ('orion remote train --again'), or restore the files on the server."
        [[ $(contents_of "$incoming") == "$there" ]] ||
            fail "the weights on the server changed during the download." "Run the same command again."
        [[ $keep ]] || note_cleanup "$(manifest_of "$incoming")"
        swap
        say "the weights are in $target, and every file matches the server's manifest"
    fi
fi

run rm -rf "$old" "$incoming"

# --- clean up --------------------------------------------------------------------------------------------------

if [[ $keep ]]; then
    say "kept on the server: ${repository:-the repository} and ${data:-the dataset}"
else
    on_server scorch "$weights" "$repository" "$data" "$verified"
    run rm -f "$pending"
    [[ $DRY_RUN ]] || say "deleted on $SERVER: $repository and $data"
fi
