#!/usr/bin/env bash
# Fetch the trained adapter from the training server, then delete repository and dataset there; see --help.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=over_ssh.sh
. "$(dirname -- "${BASH_SOURCE[0]}")/over_ssh.sh"

usage() {
    cat <<'HELP'
Usage: download_weights.sh [--keep-remote] [--dry-run]

Fetches orion_lora_weights from the training server over ssh, checks every file's sha256 with the server's manifest
(manifest.json), and puts it in the place of the old weights, which stay beside it as orion_lora_weights.previous. Then
it deletes the server's repository and dataset. Can be cut off at any point: the same command goes on.

Nothing is deleted that is not recognisably a checkout of ORION or one of its datasets, that is a home or holds one,
that is reached through a link, that a process works in, or that has changes or weights that exist nowhere else.

  --keep-remote   delete nothing on the server
  --dry-run       print every command, run none, change nothing
  --help          this text

SERVER                     the server: host or user@host
ORION_SERVER_HDD_PATH      folder on the server that upload_to_server.sh filled; gives the next three their defaults
ORION_SERVER_REPO_PATH     the repository there, to be deleted (default: $ORION_REPO_DIR, or
                           $ORION_SERVER_HDD_PATH/orion-triage)
ORION_SERVER_DATA_PATH     the dataset there, to be deleted (default: $ORION_SERVER_HDD_PATH/orion_data)
ORION_SERVER_WEIGHTS_PATH  the weights there (default: runs/tiny/orion_lora_weights in the repository)
ORION_LOCAL_WEIGHTS_DIR    the weights here (default: orion_lora_weights)
ORION_SSH                  the ssh command with its options (default: ssh with keepalives); a ControlMaster in
                           ~/.ssh/config saves logging in for each of the steps

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
    fail "ORION_LOCAL_WEIGHTS_DIR=$target names no folder." "Name the folder itself, such as runs/tiny/orion_lora_weights."
for folder in "$target" "$target.previous"; do
    [[ ! -e $folder || -f $folder/manifest.json || -f $folder/adapter_config.json ]] ||
        fail "$folder is there, and holds no weights." "Move it away, or correct ORION_LOCAL_WEIGHTS_DIR."
done
incoming=${target%/*}/.$name.incoming
pending=${target%/*}/.$name.cleanup # says that weights which are safe here are to be deleted there
old=${target%/*}/.$name.deleting

# --- steps -----------------------------------------------------------------------------------------------------

manifest_of() { # FOLDER: the sha256 of its manifest, or nothing
    [[ ! -f $1/manifest.json ]] || sha256sum <"$1/manifest.json" | cut -d ' ' -f 1
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
            faults.append(f"{name} lies elsewhere")
        elif not path.is_file():
            faults.append(f"{name} is missing")
        elif hashlib.sha256(path.read_bytes()).hexdigest() != expected:
            faults.append(f"{name} is not what the manifest says")
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
    there='SHA256_OF_RECEIPT'
    on_server weights "$weights" "$repository" "$data" "$keep"
else
    exec 9<"${target%/*}"
    flock -n 9 || fail "another download to ${target%/*} is under way." "Wait for its end."
    trap 'say "interrupted: the same command goes on from here"; exit 130' INT TERM
    rm -rf "$old"
    there=$(on_server weights "$weights" "$repository" "$data" "$keep")
    there=${there#manifest }
fi
here=
[[ $DRY_RUN ]] || here=$(manifest_of "$target")

if [[ $there == absent ]]; then
    # They are deleted there only after they were verified here.
    [[ -f $pending && $here && $(<"$pending") == "$(printf '%s\n' "$here" "$SERVER" "$weights" "$repository" "$data")" ]] ||
        fail "there are no weights in $weights on $SERVER." \
            "Train first ('orion remote train'), or correct ORION_SERVER_WEIGHTS_PATH."
    verified=$here
    complaint=$(verify "$target" 2>&1) || fail "the weights in $target are damaged: $complaint." \
        "They are deleted on the server: look for a copy, $target.previous included."
    say "the weights are in $target already"
elif [[ $here == "$there" ]] && verify "$target" 2>/dev/null; then
    verified=$here
    say "the weights are in $target already, and whole"
    [[ $keep ]] || note_cleanup "$there"
else
    verified=$there
    over_rsync -rtcL --delete -- "$SERVER:$weights/" "$incoming/"
    if [[ $DRY_RUN ]]; then
        printf '+ verify %q, which is:\n' "$incoming"
        declare -f verify | while IFS= read -r line; do printf '  | %s\n' "$line"; done
        swap
    else
        complaint=$(verify "$incoming" 2>&1) || fail "the weights on the server are not whole: $complaint." \
            "Nothing was deleted. Train them again there ('orion remote train --again'), or bring the files back."
        [[ $(manifest_of "$incoming") == "$there" ]] ||
            fail "the weights on the server changed meanwhile." "Run the same command again."
        [[ $keep ]] || note_cleanup "$there"
        swap
        say "the weights are in $target, every file as the server's manifest says"
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
