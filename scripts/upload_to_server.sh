#!/usr/bin/env bash
# Send the dataset and the repository to the training server; see --help.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=over_ssh.sh
. "$(dirname -- "${BASH_SOURCE[0]}")/over_ssh.sh"

usage() {
    cat <<'HELP'
Usage: upload_to_server.sh [--dry-run]

Sends the dataset to the training server over ssh, checks every file's sha256 there, puts it in the place of the old
dataset once it is complete, and clones or updates the repository. Can be cut off at any point: the same command goes
on, and until the new dataset is complete the old one stays.

  --dry-run   print every command, run none, change nothing
  --help      this text

SERVER                  the server: host or user@host
ORION_SERVER_HDD_PATH   folder on the server that gets the dataset and the repository; created if need be
ORION_LOCAL_DATA_DIR    the dataset here: train_, val_ and test_dataset.jsonl and orion_dataset/images
ORION_ARCHIVE_NAME      the archive's name while it travels; .gz or .zst says how it is compressed
                        (default: orion_data.tar.zst, or .gz where a side has no zstd)
ORION_REPO_DIR          the repository on the server (default: $ORION_SERVER_HDD_PATH/orion-triage)
ORION_SERVER_DATA_PATH  the dataset on the server (default: $ORION_SERVER_HDD_PATH/orion_data)
ORION_REPO_URL          the repository to send: an address that the server can reach, or a folder or git bundle here,
                        which is sent (default: the one that this script is in)
ORION_REPO_REF          its branch or tag (default: HEAD)
ORION_SSH               the ssh command with its options (default: ssh with keepalives); a ControlMaster in
                        ~/.ssh/config saves logging in for each of the steps

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
require_server_path ORION_SERVER_HDD_PATH "${ORION_SERVER_HDD_PATH:-}"
data_there=${ORION_SERVER_DATA_PATH:-$ORION_SERVER_HDD_PATH/orion_data}
repository_there=${ORION_REPO_DIR:-$ORION_SERVER_HDD_PATH/orion-triage}
require_server_path ORION_SERVER_DATA_PATH "$data_there"
require_server_path ORION_REPO_DIR "$repository_there"
require_tools rsync tar gzip sha256sum flock git

data=${ORION_LOCAL_DATA_DIR:-}
[[ $data ]] || fail "ORION_LOCAL_DATA_DIR is not set." "Name the dataset's folder: 'orion dataset' makes runs/tiny/dataset."
[[ $data == /* ]] || data=$PWD/$data
for part in train_dataset.jsonl val_dataset.jsonl test_dataset.jsonl orion_dataset/images; do
    [[ -e $data/$part ]] || fail "$data has no $part." \
        "Make the dataset with 'orion dataset', or correct ORION_LOCAL_DATA_DIR."
done
[[ $(find "$data/orion_dataset/images" -mindepth 1 -print -quit) ]] ||
    fail "$data/orion_dataset/images is empty." "'orion clean' removes frames: make them again with 'orion dataset --force'."

archive_name=${ORION_ARCHIVE_NAME:-}
[[ $archive_name != */* && $archive_name != -* ]] ||
    fail "ORION_ARCHIVE_NAME=$archive_name is not a file name." "Leave out the folders and a leading dash."
[[ $archive_name =~ ^(|.+\.(gz|zst))$ ]] ||
    fail "ORION_ARCHIVE_NAME=$archive_name does not say how to compress." "End it in .gz or .zst."

source=${ORION_REPO_URL:-$(git -C "$SCRIPTS" rev-parse --show-toplevel 2>/dev/null || true)}
revision=${ORION_REPO_REF:-HEAD}
[[ $source ]] || fail "there is no repository around this script." "Set ORION_REPO_URL."
[[ $source != -* && $revision != -* && $revision != *:* ]] ||
    fail "ORION_REPO_URL and ORION_REPO_REF must not begin with a dash." "Write ./ before a folder's name."

# --- archive ---------------------------------------------------------------------------------------------------

work=${ORION_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/orion-triage}/upload
[[ $work == /* ]] || work=$PWD/$work
if [[ ! $DRY_RUN ]]; then
    mkdir -p "$work"
    exec 9<"$work"
    flock -n 9 || fail "another upload is under way on this machine." "Wait for its end."
    trap 'rm -rf "$work"' EXIT
    trap 'say "interrupted: the same command goes on from here"; exit 130' INT TERM
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
        *) say "not part of a dataset, and not sent: $part" ;;
    esac
done

listing=$work/.orion-sha256sums
if [[ $DRY_RUN ]]; then
    show cd "$data"
    printf '%s | LC_ALL=C sort -z | xargs -0 sha256sum >%q\n' "$(show find -L "${parts[@]}" -type f -print0)" "$listing"
    listing_sha256='SHA256_OF_LISTING'
    on_server prepare "$data_there" "$repository_there" "$listing_sha256"
    answers=$'commit none\nzstd yes\ndataset wanted'
else
    say "hashing $data"
    (cd "$data" && find -L "${parts[@]}" -type f -print0 | LC_ALL=C sort -z | xargs -0 sha256sum) >"$listing"
    listing_sha256=$(sha256sum <"$listing" | cut -d ' ' -f 1)
    answers=$(on_server prepare "$data_there" "$repository_there" "$listing_sha256")
fi

incoming_there=${data_there%/*}/.${data_there##*/}.orion-incoming
if [[ $answers == *'dataset current'* ]]; then
    say "the dataset is there already, and whole"
else
    if [[ ! $archive_name ]]; then
        archive_name=orion_data.tar.gz
        if [[ $answers == *'zstd yes'* ]] && command -v zstd >/dev/null; then archive_name=orion_data.tar.zst; fi
    fi
    case $archive_name in *.zst) compress='zstd -T0' ;; *) compress='gzip -n' ;; esac
    require_tools "${compress%% *}"
    [[ $archive_name != *.zst || $answers == *'zstd yes'* ]] ||
        fail "the server has no zstd." "Install it there (apt install zstd), or end ORION_ARCHIVE_NAME in .gz."
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
        say "$source has changes that are not committed, and not sent"
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
