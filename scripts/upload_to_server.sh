#!/usr/bin/env bash
# Send the dataset and the repository to the training server; see --help.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=over_ssh.sh
. "$(dirname -- "${BASH_SOURCE[0]}")/over_ssh.sh"

usage() {
    cat <<'HELP'
Usage: upload_to_server.sh [--dry-run]

Sends the dataset to the training server over ssh and checks the sha256 of every file there. When the new dataset is
complete, it replaces the old one. Then clones or updates the repository. After an interruption, run the same command
again to resume. The old dataset stays until the new one is complete.

  --dry-run   print all commands without running them
  --help      print this text

SERVER                  the server: host or user@host
ORION_SERVER_HDD_PATH   folder on the server for the dataset and the repository; created if missing
ORION_LOCAL_DATA_DIR    the local dataset: train_, val_ and test_dataset.jsonl and orion_dataset/images
ORION_ARCHIVE_NAME      file name of the transferred archive; the suffix .gz or .zst selects the compression
                        (default: orion_data.tar.zst, or .gz if one side has no zstd)
ORION_REPO_DIR          the repository on the server (default: $ORION_SERVER_HDD_PATH/orion-triage)
ORION_SERVER_DATA_PATH  the dataset on the server (default: $ORION_SERVER_HDD_PATH/orion_data)
ORION_REPO_URL          the repository to send: a URL that the server can reach, or a local folder or git bundle
                        (default: the repository of this script)
ORION_REPO_REF          its branch or tag (default: HEAD)
ORION_SERVER_SETUP      the command that makes .venv in the repository on the server (default: make setup; then its
                        make and Python are checked before anything is sent)
ORION_SSH               the ssh command with its options (default: ssh with keepalives); with a ControlMaster in
                        ~/.ssh/config, all steps share one login

Example: SERVER=me@gpu ORION_SERVER_HDD_PATH=/data/me ORION_LOCAL_DATA_DIR=runs/tiny/dataset \
         scripts/upload_to_server.sh
HELP
}

while (($#)); do
    case $1 in
        --dry-run) DRY_RUN=yes ;;
        --help | -h) usage && exit ;;
        *) misuse "there is no option '$1'." ;;
    esac
    shift
done

# --- what is to be sent, and where -----------------------------------------------------------------------------

require_server
root=${ORION_SERVER_HDD_PATH:-}
[[ ${ORION_SERVER_DATA_PATH:-} && ${ORION_REPO_DIR:-} ]] || require_server_path ORION_SERVER_HDD_PATH "$root"
data_there=${ORION_SERVER_DATA_PATH:-$root/orion_data}
repository_there=${ORION_REPO_DIR:-$root/orion-triage}
require_server_path ORION_SERVER_DATA_PATH "$data_there"
require_server_path ORION_REPO_DIR "$repository_there"
require_tools rsync tar gzip sha256sum flock git

data=${ORION_LOCAL_DATA_DIR:-}
[[ $data ]] || fail "ORION_LOCAL_DATA_DIR is not set." \
    "Set it to the dataset's folder ('orion dataset' makes runs/tiny/dataset)."
[[ $data == /* ]] || data=$PWD/$data
for part in train_dataset.jsonl val_dataset.jsonl test_dataset.jsonl orion_dataset/images; do
    [[ -e $data/$part ]] || fail "$data has no $part." \
        "Run 'orion dataset' to make it, or correct ORION_LOCAL_DATA_DIR."
done
[[ $(find "$data/orion_dataset/images" -mindepth 1 -print -quit) ]] ||
    fail "$data/orion_dataset/images is empty (removed by 'orion clean'?)." \
        "Run 'orion dataset --force' to make the frames again."

archive_name=${ORION_ARCHIVE_NAME:-}
[[ $archive_name != */* && $archive_name != -* ]] ||
    fail "ORION_ARCHIVE_NAME=$archive_name is not a file name." "Write it without folders and leading dash."
[[ $archive_name =~ ^(|.+\.(gz|zst))$ ]] ||
    fail "ORION_ARCHIVE_NAME=$archive_name does not end in .gz or .zst." "Add .gz or .zst."

source=${ORION_REPO_URL:-$(git -C "$SCRIPTS" rev-parse --show-toplevel 2>/dev/null || true)}
revision=${ORION_REPO_REF:-HEAD}
[[ $source ]] || fail "this script is not in a git repository." "Set ORION_REPO_URL."
[[ $source != -* && $revision != -* && $revision != *:* ]] ||
    fail "ORION_REPO_URL or ORION_REPO_REF begins with a dash, or ORION_REPO_REF contains a colon." \
        "Write ./ before a folder's name, and correct ORION_REPO_REF."

# What `make setup` needs is checked on the server, unless another command is used there.
python=
if [[ ${ORION_SERVER_SETUP:-make setup} == 'make setup' ]]; then
    python=$(sed -n 's/^requires-python = ">=\([0-9.]*\)".*/\1/p' "$SCRIPTS/../pyproject.toml")
    [[ $python ]] || fail "$SCRIPTS/../pyproject.toml states no requires-python." "Use the scripts in a clone of ORION."
fi

# --- archive ---------------------------------------------------------------------------------------------------

work=${ORION_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/orion-triage}/upload
[[ $work == /* ]] || work=$PWD/$work
if [[ ! $DRY_RUN ]]; then
    mkdir -p "$work"
    exec 9<"$work"
    flock -n 9 || fail "another upload is running on this machine." "Wait until it ends."
    trap 'rm -rf "$work"' EXIT
    trap 'say "interrupted: run the same command again to resume"; exit 130' INT TERM
    find "$work" -mindepth 1 -delete
fi

shopt -s nullglob dotglob
parts=()
for part in "$data"/*; do
    part=${part##*/}
    case $part in
        train_dataset.jsonl | val_dataset.jsonl | test_dataset.jsonl | orion_dataset | frames.csv | absent.csv | README.md)
            parts+=("$part") ;;
        manifest.json | .orion-sha256sums) ;; # manifests of this place
        *) say "not sent, because it is not part of a dataset: $part" ;;
    esac
done

listing=$work/.orion-sha256sums
if [[ $DRY_RUN ]]; then
    show cd "$data"
    printf '%s | LC_ALL=C sort -z | xargs -0 sha256sum >%q\n' "$(show find -L "${parts[@]}" -type f -print0)" "$listing"
    listing_sha256='SHA256_OF_LISTING'
    on_server prepare "$data_there" "$repository_there" "$listing_sha256" "$python"
    answers=$'commit none\nzstd yes\ndataset wanted'
else
    say "hashing $data"
    (cd "$data" && find -L "${parts[@]}" -type f -print0 | LC_ALL=C sort -z | xargs -0 sha256sum) >"$listing"
    listing_sha256=$(sha256sum <"$listing" | cut -d ' ' -f 1)
    answers=$(on_server prepare "$data_there" "$repository_there" "$listing_sha256" "$python")
    [[ $answers != *'compiler no'* ]] ||
        say "the server has no C++ compiler. Training needs none; quantizing there would (apt install g++)"
fi

incoming_there=${data_there%/*}/.${data_there##*/}.orion-incoming
if [[ $answers == *'dataset current'* ]]; then
    say "the server already has the complete dataset"
else
    if [[ ! $archive_name ]]; then
        archive_name=orion_data.tar.gz
        if [[ $answers == *'zstd yes'* ]] && command -v zstd >/dev/null; then archive_name=orion_data.tar.zst; fi
    fi
    case $archive_name in *.zst) compress='zstd -T0' ;; *) compress='gzip -n' ;; esac
    require_tools "${compress%% *}"
    [[ $archive_name != *.zst || $answers == *'zstd yes'* ]] ||
        fail "the server has no zstd." "Run apt install zstd on the server, or end ORION_ARCHIVE_NAME in .gz."
    say "compressing $(du -shL "$data" | cut -f 1)"
    # The same dataset gives the same bytes, so that a transfer can go on with an archive that was made anew.
    run tar --create --dereference --sort=name --format=gnu --mtime=@0 --owner=0 --group=0 --numeric-owner \
        -I "$compress" -f "$work/$archive_name" -C "$work" .orion-sha256sums -C "$data" "${parts[@]}"
    if [[ $DRY_RUN ]]; then
        archive_sha256='SHA256_OF_ARCHIVE'
    else
        archive_sha256=$(sha256sum <"$work/$archive_name" | cut -d ' ' -f 1)
        say "sending $(du -h "$work/$archive_name" | cut -f 1) to $SERVER"
    fi
    over_rsync --append-verify -- "$work/$archive_name" "$SERVER:$incoming_there/$archive_name"
    on_server unpack "$data_there" "$archive_name" "$archive_sha256"
    run rm -f "$work/$archive_name"
    say "the dataset is in $data_there"
fi

# --- repository ------------------------------------------------------------------------------------------------

if [[ -d $source ]]; then
    [[ -z $(git -C "$source" status --porcelain 2>/dev/null) ]] ||
        say "$source has uncommitted changes, which are not sent"
    # A bundle holds what the server has not got yet.
    commit=$(git -C "$source" rev-parse --verify "$revision^{commit}") ||
        fail "$source has no $revision." "Correct ORION_REPO_URL or ORION_REPO_REF."
    there=$(sed -n 's/^commit //p' <<<"$answers")
    bundled=()
    if git -C "$source" cat-file -e "$there^{commit}" 2>/dev/null &&
        ! git -C "$source" merge-base --is-ancestor "$commit" "$there"; then
        bundled=("^$there")
    fi
    if [[ $there == "$commit" ]]; then
        source=
    else
        run git -C "$source" bundle create --quiet "$work/repository.bundle" "$revision" "${bundled[@]}"
        source=$work/repository.bundle
    fi
fi
if [[ -f $source || $source == "$work/"* ]]; then
    over_rsync -- "$source" "$SERVER:$incoming_there/repository.bundle"
    source=
fi
answers=$(on_server checkout "$data_there" "$repository_there" "$source" "$revision")
if [[ $DRY_RUN ]]; then
    printf '%s\n' "$answers"
else
    say "the repository is in $repository_there, at ${answers#commit }"
fi
