#!/bin/sh
# The server's part of upload_to_server.sh, download_weights.sh and `orion remote train`. They send this whole file and
# one call of `operate` through `ssh SERVER sh -s`: a transfer that is cut off ends inside a function, and nothing runs.
#
# Needs sh, coreutils, findutils, grep, sed and flock; git, rsync and tar where they are used. Answers are lines
# "orion: KEY VALUE" on standard output, whatever else a login prints. Exit status 3: the reason is on standard error
# already.
#
# Beside a folder F lie, while work on it is under way: .F.orion-incoming (what arrives), .F.orion-previous (the old one
# between the two renames of a swap) and .F.orion-deleting (what a deletion has renamed).

set -eu
export LC_ALL=C

refuse() { # MESSAGE FIX
    printf 'error: %s\n  fix: %s\n' "$1" "$2" >&2
    exit 3
}

answer() { # KEY VALUE
    printf 'orion: %s %s\n' "$1" "$2"
}

beside() { # FOLDER KIND -> $place; newlines at a name's end survive, which they would not in $(...)
    place="${1%/*}/.${1##*/}.orion-$2"
}

sha256_of() { # FILE
    sha256sum <"$1" | cut -d ' ' -f 1
}

hashes_of() { # FOLDER EXCEPT: "SHA256  NAME" of each file in it, as sha256sum prints it; fails if one cannot be read
    hashes=$(cd "$1" && find . -type f ! -path "./$2" -exec sha256sum {} +) || return
    printf '%s\n' "$hashes" | sed 's#^\(\\\{0,1\}[0-9a-f]\{64\}  \)\./#\1#'
}

contents_of() { # FOLDER: one sha256 of all names and bytes in it; download_weights.sh has its twin
    (cd "$1" && find -L . -type f -exec sha256sum {} + | sort) | sha256sum | cut -d ' ' -f 1
}

first_of() { # LINES: eight of them
    printf '%s\n' "$1" | sed '9{
        s/.*/  .../
        q
    }'
}

lines_without() { # LINES KNOWN: the lines that are not among the known ones, each once
    { printf '%s\n' "$1" | sort -u && printf '%s\n' "$2" "$2"; } | sort | uniq -u
}

# --- what may be replaced or deleted ---------------------------------------------------------------------------

require_own_place() { # VARIABLE PATH: its parent exists, no link leads there, it is no home and holds none
    parent=${2%/*}
    real=$(cd -P "${parent:-/}" 2>/dev/null && pwd -P && printf x) ||
        refuse "$1=$2: the folder ${parent:-/} does not exist on the server." "Create it there, or correct $1."
    real=${real%?x}
    [ "$real" != / ] || real=
    [ "$real" = "$parent" ] ||
        refuse "$1=$2 is reached through a link." "Set its real path: $1=$real/${2##*/}"
    [ ! -L "$2" ] || refuse "$1=$2 is a link." "Set the folder itself: $1=$(readlink -f "$2")"
    {
        printf '%s\n' "${HOME:-}"
        (cd -P "${HOME:-/}" 2>/dev/null && pwd -P) || :
        { getent passwd || cat /etc/passwd; } 2>/dev/null | cut -d : -f 6
    } | while IFS= read -r home; do
        case "$home/" in
            "$2"/*) refuse "$1=$2 is or contains the home folder $home." "Set $1 to a separate folder." ;;
        esac
    done || exit 3
}

require_apart() { # VARIABLE PATH VARIABLE PATH
    case "$4/" in
        "$2"/*) refuse "$1=$2 contains $3=$4." "Use two separate folders." ;;
    esac
}

require_only() { # VARIABLE FOLDER PATTERN...: a folder with anything else in it is more than a dataset
    variable=$1 folder=$2
    shift 2
    for entry in "$folder"/* "$folder"/.[!.]* "$folder"/..?*; do
        [ -e "$entry" ] || [ -L "$entry" ] || continue
        known=
        for pattern; do
            # shellcheck disable=SC2254 # a pattern, not a word
            case "${entry##*/}" in $pattern) known=yes ;; esac
        done
        [ "$known" ] || refuse "$variable=$folder contains more than a dataset: ${entry##*/}" \
            "Move it away, or set $variable to the dataset's folder."
    done
}

is_dataset() { # FOLDER
    [ -f "$1/train_dataset.jsonl" ] && [ -f "$1/val_dataset.jsonl" ] && [ -f "$1/test_dataset.jsonl" ] &&
        [ -d "$1/orion_dataset/images" ] && [ ! -L "$1/orion_dataset" ] && [ ! -L "$1/orion_dataset/images" ]
}

require_dataset() { # VARIABLE PATH
    is_dataset "$2" || refuse \
        "$1=$2 is not an ORION dataset: it needs train_, val_ and test_dataset.jsonl and orion_dataset/images." \
        "Correct $1, or move that folder away."
    require_only "$1" "$2" '*_dataset.jsonl' orion_dataset '*.csv' '*.json' '*.geojson' '*.md' 'LICENSE*' \
        .gitattributes .orion-sha256sums
    require_only "$1" "$2/orion_dataset" images '*_dataset.jsonl'
}

require_checkout() { # VARIABLE PATH
    { [ -d "$2/.git" ] && [ ! -L "$2/.git" ] && [ -f "$2/pyproject.toml" ] &&
        grep -q -x 'name = "orion-triage"' "$2/pyproject.toml" && git -C "$2" rev-parse --git-dir >/dev/null; } ||
        refuse "$1=$2 is not a checkout of ORION: a git repository whose pyproject.toml has name = \"orion-triage\"." \
            "Correct $1."
    ! git -C "$2" config core.worktree >/dev/null ||
        refuse "$1=$2 is a repository whose files lie elsewhere (core.worktree)." "Correct $1."
}

exact_git() { # ARGUMENT...: git, which looks at every file, whatever the server's settings let it skip
    git --no-optional-locks -c core.fsmonitor=false -c core.ignoreCase=false "$@"
}

require_seen() { # VARIABLE REPOSITORY: git was not told to overlook changes of a file
    hidden=$(git -C "$2" -c core.quotePath=false ls-files -v) ||
        refuse "git cannot read $1=$2." "Check the repository on the server."
    hidden=$(printf '%s\n' "$hidden" | sed -n 's/^[a-zS] //p' | head -n 1)
    [ -z "$hidden" ] || refuse "$1=$2 has a file whose changes git was told to overlook: $hidden" \
        "Run git update-index --no-assume-unchanged FILE (or --no-skip-worktree), or git sparse-checkout disable, there."
}

require_idle() { # VARIABLE PATH: no training that `start` started is at work there
    [ -e "$2/runs/training-job/lock" ] || return 0
    flock -n "$2/runs/training-job/lock" true ||
        refuse "a training is running in $1=$2." "Wait until it ends ('orion remote train' follows it)."
}

busy() { # FOLDER: the working directory of a process there, if any
    readlink /proc/[0-9]*/cwd 2>/dev/null | while IFS= read -r directory; do
        case "$directory/" in
            "$1"/*) printf '%s\n' "$directory" && break ;;
        esac
    done
}

require_sent() { # VARIABLE DATASET: every file is as an upload from elsewhere brought it
    hashes=$(hashes_of "$2" .orion-sha256sums) ||
        refuse "$1=$2 cannot be read." "Correct the permissions on the server."
    own=$(lines_without "$hashes" "$(cat "$2/.orion-sha256sums" 2>/dev/null || :)")
    [ -z "$own" ] || refuse \
        "$1=$2 has files that no upload brought, or that changed since ($(printf '%s\n' "$own" | wc -l) in all):
$(first_of "$(printf '%s\n' "$own" | cut -d ' ' -f 2-)")" \
        "Move them out of it. Or leave it: --keep-remote (download), another ORION_SERVER_DATA_PATH (upload)."
}

is_copy() { # DATASET OF A RUN: `orion dataset` copied it from a folder, and nobody has changed it since
    { [ ! -L "$1" ] && grep -q '^      "source": "directory",\{0,1\}$' "$1/manifest.json" &&
        hashes=$(hashes_of "$1" manifest.json) &&
        hashes=$(printf '%s\n' "$hashes" | sed 's/^\\//' | cut -c 1-64) &&
        known=$(grep -o '"[0-9a-f]\{64\}"' "$1/manifest.json" | tr -d '"') &&
        [ -z "$(lines_without "$hashes" "$known")" ]; } 2>/dev/null
}

# Git lists every ignored file, one a line, odd names in quotes, a nested repository as one name with a slash at its end.
unfetched() { # REPOSITORY WEIGHTS: the ignored files that were not fetched and that nothing makes again
    repository=$1 fetched=$2
    set -- .venv .mypy_cache .ruff_cache .pytest_cache runs/training-job
    case "$fetched" in
        "$repository"/runs/*/orion_lora_weights)
            run=${fetched%/*} run=${run#"$repository"/}
            for product in .lock settings.json logs fine_tune_work/fingerprint.txt fine_tune_work/checkpoints \
                fine_tune_work/tensorboard; do
                set -- "$@" "$run/$product"
            done
            ! is_copy "$repository/$run/dataset" || set -- "$@" "$run/dataset"
            ;;
    esac
    case "$fetched" in "$repository"/*) set -- "$@" "${fetched#"$repository"/}" ;; esac
    for expendable; do
        set -- "$@" ":(exclude,literal)$expendable"
        shift
    done
    exact_git -C "$repository" -c core.quotePath=false ls-files --others --ignored --exclude-standard -- \
        . ':(exclude,glob)**/__pycache__/*.pyc' ':(exclude,glob)src/*.egg-info/**' "$@"
}

require_expendable() { # VARIABLE REPOSITORY WEIGHTS: nothing is in the checkout that exists nowhere else
    require_idle "$1" "$2"
    for _ in 1 2 3 4 5; do # the rsync of a connection that was cut may take a moment to notice
        [ "$(busy "$2")" ] || break
        sleep 1
    done
    directory=$(busy "$2")
    [ -z "$directory" ] || refuse "a process works in $directory." \
        "Wait until it ends (an interrupted rsync ends within two minutes), or leave that folder."
    require_seen "$1" "$2"
    # The server's own git may be set to list no untracked files.
    changed=$(exact_git -C "$2" status --porcelain --untracked-files=normal --ignore-submodules=none) ||
        refuse "git cannot read $1=$2." "Check the repository on the server."
    [ -z "$changed" ] || refuse "$1=$2 has uncommitted changes: $(printf '%s' "$changed" | head -n 1)" \
        "Commit and push them, discard them, or add --keep-remote."
    own=$(git -C "$2" rev-list -n 1 HEAD --all --not --remotes) || own=HEAD
    [ -z "$own" ] || refuse "$1=$2 has commits that exist nowhere else: $own" "Push them, or add --keep-remote."
    # What an upload brought and a later one replaced is in the reflogs too: also in those of the remote branches.
    own=$(git -C "$2" rev-list -g --remotes | sed 's/^/^/' |
        git -C "$2" rev-list -n 1 --ignore-missing --reflog --not --remotes --stdin) || own=HEAD
    [ -z "$own" ] || refuse "$1=$2 has commits that only its reflog still names: $own" \
        "Push them, discard them (git reflog expire --expire=now --all), or add --keep-remote."
    for name in worktrees modules rebase-merge rebase-apply MERGE_AUTOSTASH; do
        [ ! -e "$2/.git/$name" ] || refuse "$1=$2 has .git/$name: work that may exist nowhere else." \
            "End it (git worktree remove, git rebase --continue or the like), or add --keep-remote."
    done
    # What a nested repository holds, git lists nowhere. It may lie in a folder that could go.
    nested=$(cd "$2" && find . -path ./.git -prune -o -name .git -print) ||
        refuse "$1=$2 cannot be read." "Correct the permissions on the server, or add --keep-remote."
    [ -z "$nested" ] || refuse "$1=$2 has another repository in it: $(printf '%s' "$nested" | head -n 1)" \
        "Move it out of the checkout, or add --keep-remote."
    files=$(unfetched "$2" "$3") || refuse "git cannot read $1=$2." "Check the repository on the server."
    [ -n "$files" ] || return 0
    folders=$(printf '%s\n' "$files" | cut -d / -f 1-3 | uniq -c)
    count=$(printf '%s\n' "$files" | wc -l)
    refuse "$1=$2 has files that were not fetched and may exist nowhere else ($count in all):
$(first_of "$folders")" \
        "Fetch them (weights: ORION_SERVER_WEIGHTS_PATH; others: rsync), move them out of it, or add --keep-remote."
}

remove_folder() { # FOLDER: renamed first, so that a cut leaves nothing that looks whole
    beside "$1" deleting
    rm -rf "$place"
    [ ! -e "$1" ] || mv -T "$1" "$place"
    rm -rf "$place"
}

# One operation at a time: after a cut, the server's half may still be at work when the next call comes.
lock() { # FOLDER
    exec 9<"$1"
    flock -w 120 9 ||
        refuse "an earlier call is still running in $1." "Wait until it ends, then run the same command again."
}

# --- upload ----------------------------------------------------------------------------------------------------

has_python() { # PYTHON VERSION: it runs, and is at least that; prints its own
    "$1" -c 'import sys
print("%d.%d.%d" % sys.version_info[:3])
sys.exit(sys.version_info[:3] < tuple(int(part) for part in sys.argv[1].split(".")))' "$2" 2>/dev/null
}

require_setup() { # REPOSITORY VERSION: what `make setup` takes from the server, with Python of this version at least
    missing='' packages='' fix=''
    command -v make >/dev/null || missing=' It has no make.' packages=' make'
    python=${PYTHON:-python3} module=ensurepip # of Makefile; without ensurepip `-m venv` fails
    if [ -x "$1/.venv/bin/python" ]; then python=$1/.venv/bin/python module=pip; fi
    if ! found=$(has_python "$python" "$2"); then
        missing="$missing It needs Python $2 or newer, and $python is ${found:-not there}."
        more=" python$2 python$2-venv"
        fix=" Then set ORION_SERVER_SETUP='make setup PYTHON=python$2' here."
        for other in python3.11 python3.12 python3.13; do
            has_python "$other" "$2" >/dev/null || continue
            more=" $other-venv" fix=" Then set ORION_SERVER_SETUP='make setup PYTHON=$other' here."
        done
        packages=$packages$more
    elif ! "$python" -c "import venv, $module; getattr($module, 'version', str)()" >/dev/null 2>&1; then
        missing="$missing $python makes no environments: its module $module does not work."
        packages="$packages python3-venv"
    fi
    [ -z "$missing" ] || refuse "the server cannot run 'make setup'.$missing" \
        "Run apt install$packages on the server.$fix With another command that makes .venv: set ORION_SERVER_SETUP."
    # llama.cpp is compiled after a training, for `orion quantize` and `orion evaluate`.
    if command -v "${CXX:-c++}" >/dev/null; then answer compiler yes; else answer compiler no; fi
}

prepare() { # DATA REPOSITORY SHA256_OF_LISTING PYTHON: check the server, finish or forget what was cut off
    for tool in rsync tar gzip sha256sum git flock; do
        command -v "$tool" >/dev/null ||
            refuse "the server has no $tool." "Run apt install rsync tar gzip coreutils git util-linux on the server."
    done
    [ -z "$4" ] || require_setup "$2" "$4"
    mkdir -p "${1%/*}" "${2%/*}"
    require_own_place ORION_SERVER_DATA_PATH "$1"
    require_own_place ORION_REPO_DIR "$2"
    require_apart ORION_SERVER_DATA_PATH "$1" ORION_REPO_DIR "$2"
    require_apart ORION_REPO_DIR "$2" ORION_SERVER_DATA_PATH "$1"
    lock "${1%/*}"
    beside "$1" previous
    if [ ! -e "$1" ] && is_dataset "$place"; then
        mv -T "$place" "$1"
    fi
    if [ -e "$1" ]; then
        require_dataset ORION_SERVER_DATA_PATH "$1"
        require_sent ORION_SERVER_DATA_PATH "$1"
    fi
    [ ! -e "$2" ] || require_checkout ORION_REPO_DIR "$2"
    require_idle ORION_REPO_DIR "$2"
    [ ! -e "$1" ] || rm -rf "$place"
    beside "$1" incoming
    # Keep what an earlier call left of the same dataset, to resume; delete anything else.
    [ "$(cat "$place/listing" 2>/dev/null)" = "$3" ] || rm -rf "$place"
    mkdir -p "$place"
    printf '%s' "$3" >"$place/listing"
    answer commit "$(git -C "$2" rev-parse -q --verify refs/remotes/orion/uploaded 2>/dev/null || echo none)"
    if command -v zstd >/dev/null; then answer zstd yes; else answer zstd no; fi
    # No file is there that was not sent, or not as it was sent; so all are, if none is missing.
    if [ -f "$1/.orion-sha256sums" ] && [ "$(sha256_of "$1/.orion-sha256sums")" = "$3" ] &&
        [ "$(printf '%s\n' "$hashes" | wc -l)" = "$(wc -l <"$1/.orion-sha256sums")" ]; then
        answer dataset current
    else
        answer dataset wanted
    fi
}

unpack() { # DATA ARCHIVE SHA256: check the archive, unpack it beside the old dataset, swap when it is complete
    lock "${1%/*}"
    beside "$1" incoming
    cd "$place"
    [ -f "$2" ] || refuse "the archive is missing in $place." "Run the same command again to send it again."
    if [ "$(sha256_of "$2")" != "$3" ]; then
        rm -f "$2"
        refuse "the archive arrived damaged: its sha256 is not $3." "Run the same command again to send it again."
    fi
    rm -rf unpacked
    mkdir unpacked
    case "$2" in *.zst) program=zstd ;; *) program=gzip ;; esac
    if ! { tar -x -I "$program" --no-same-owner -f "$2" -C unpacked &&
        (cd unpacked && sha256sum --quiet -c .orion-sha256sums) && is_dataset unpacked; }; then
        rm -rf unpacked
        refuse "the dataset could not be unpacked beside $1; the old dataset is unchanged." \
            "Fix the problem reported above (full disk? df -h ${1%/*}), then run the same command again."
    fi
    incoming=$place
    beside "$1" previous
    if [ -e "$1" ]; then
        require_own_place ORION_SERVER_DATA_PATH "$1"
        require_dataset ORION_SERVER_DATA_PATH "$1"
        require_sent ORION_SERVER_DATA_PATH "$1"
        rm -rf "$place"
        mv -T "$1" "$place"
    fi
    mv -T "$incoming/unpacked" "$1"
    rm -rf "$place"
    rm -f "$incoming/$2"
}

git_or_refuse() { # FIX ARGUMENT...: git, which leaves the passwords of addresses out of what it says
    fix=$1
    shift
    # No housekeeping in the background: it would hold the lock.
    complaint=$(git -c gc.auto=0 -c maintenance.auto=false "$@" 2>&1 >/dev/null) || refuse \
        "git failed: $(printf '%s' "$complaint" | tr '\n' ' ')" "$fix"
}

in_the_way() { # REPOSITORY REVISION: files that git does not track, where the revision has files: `reset` deletes them
    # shellcheck disable=SC2016 # expanded by the inner shell
    git -C "$1" diff-index -z --cached --no-renames --diff-filter=D --name-only "$2" | (
        cd "$1"
        xargs -0 -r sh -c '
            for path; do
                shift
                # Not in the index, so not ours. Git would not say so of a file in a nested repository.
                if [ -L "$path" ] || { [ -e "$path" ] && [ ! -d "$path" ]; }; then printf "%s\n" "$path"; fi
                [ ! -d "$path" ] || set -- "$@" "$path"
                while case $path in */*) ;; *) false ;; esac; do
                    path=${path%/*}
                    if [ -L "$path" ] || { [ -e "$path" ] && [ ! -d "$path" ]; }; then set -- "$@" "$path"; fi
                done
            done
            # Of a folder in the place of a file, and a file in the place of a folder, git knows what is not its own.
            [ "$#" = 0 ] || git --literal-pathspecs -c core.quotePath=false ls-files --others -- "$@"
        ' sh
    )
}

checkout() { # DATA REPOSITORY ADDRESS REVISION: clone or pull; no address: from the bundle that was sent, if any
    export GIT_TERMINAL_PROMPT=0
    lock "${1%/*}"
    beside "$1" incoming
    incoming=$place
    address=${3:-$incoming/repository.bundle}
    require_own_place ORION_REPO_DIR "$2"
    folder=$2
    beside "$2" incoming
    if [ ! -e "$2" ]; then
        folder=$place
        rm -rf "$folder"
        git_or_refuse "Check the server's disk." init -q "$folder"
    else
        require_checkout ORION_REPO_DIR "$2"
        require_idle ORION_REPO_DIR "$2"
    fi
    beside "$2" update
    # An update that was cut off may leave git's lock and half of the new files; the files were clean when it began.
    if [ -e "$place" ]; then
        rm -f "$folder/.git/index.lock"
    elif [ "$folder" = "$2" ]; then
        require_seen ORION_REPO_DIR "$folder"
        changed=$(exact_git -C "$folder" status --porcelain --untracked-files=no)
        [ -z "$changed" ] || refuse "$2 has uncommitted changes: $(printf '%s' "$changed" | head -n 1)" \
            "Commit or discard them on the server, then run the same command again."
    fi
    if [ "$3" ] || [ -f "$address" ]; then
        git_or_refuse \
            "Correct ORION_REPO_URL or ORION_REPO_REF, or give the server access. Then run the same command again." \
            -C "$folder" fetch -q --no-tags -- "$address" "+$4:refs/remotes/orion/fetched"
    fi
    if [ "$folder" = "$2" ] && [ ! -e "$place" ]; then
        own=$(git -C "$folder" rev-list -n 1 HEAD --not --remotes)
        [ -z "$own" ] || refuse "$2 has commits that exist nowhere else: $own" \
            "Push them, then run the same command again."
        clash=$(in_the_way "$folder" refs/remotes/orion/fetched)
        [ -z "$clash" ] || refuse "$2 has files that the new revision would overwrite:
$(first_of "$clash")" "Move them away on the server, then run the same command again."
    fi
    : >"$place"
    git_or_refuse "Check $2 on the server." -C "$folder" reset -q --hard refs/remotes/orion/fetched
    git -C "$folder" update-ref refs/remotes/orion/uploaded refs/remotes/orion/fetched
    require_checkout ORION_REPO_DIR "$folder"
    [ "$folder" = "$2" ] || mv -T "$folder" "$2"
    rm -f "$place"
    rm -rf "$incoming"
    answer commit "$(git -C "$2" rev-parse HEAD)"
}

# --- download --------------------------------------------------------------------------------------------------

require_deletable() { # WEIGHTS REPOSITORY DATA: what is there may be deleted; what is gone already may be gone
    if [ -e "$3" ] || [ -L "$3" ]; then
        require_own_place ORION_SERVER_DATA_PATH "$3"
        require_dataset ORION_SERVER_DATA_PATH "$3"
    fi
    if [ -e "$2" ] || [ -L "$2" ]; then
        require_own_place ORION_SERVER_REPO_PATH "$2"
        require_checkout ORION_SERVER_REPO_PATH "$2"
    fi
    # The weights may lie in the repository, and go with it; nothing else may lie in anything else.
    require_apart ORION_SERVER_REPO_PATH "$2" ORION_SERVER_DATA_PATH "$3"
    require_apart ORION_SERVER_DATA_PATH "$3" ORION_SERVER_REPO_PATH "$2"
    require_apart ORION_SERVER_DATA_PATH "$3" ORION_SERVER_WEIGHTS_PATH "$1"
    require_apart ORION_SERVER_WEIGHTS_PATH "$1" ORION_SERVER_REPO_PATH "$2"
    require_apart ORION_SERVER_WEIGHTS_PATH "$1" ORION_SERVER_DATA_PATH "$3"
    [ ! -e "$2" ] || require_expendable ORION_SERVER_REPO_PATH "$2" "$1"
    [ ! -e "$3" ] || require_sent ORION_SERVER_DATA_PATH "$3"
}

weights() { # WEIGHTS REPOSITORY DATA KEEP: one sha256 of all weights, after a look at what will be deleted
    command -v rsync >/dev/null || refuse "the server has no rsync." "Run apt install rsync on the server."
    [ "$4" ] || require_deletable "$1" "$2" "$3"
    if [ -f "$1/manifest.json" ]; then
        answer contents "$(contents_of "$1")"
    elif [ -e "$1" ]; then
        refuse "$1 is not finished: it has no manifest.json." "Wait until 'orion fine-tune' on the server ends."
    else
        answer contents absent
    fi
}

scorch() { # WEIGHTS REPOSITORY DATA SHA256_OF_WEIGHTS: delete dataset, then repository
    [ ! -d "${3%/*}" ] || lock "${3%/*}"
    # The weights may lie in the repository. Gone means that an earlier call came that far: its remains go, and
    # whatever stands there by now is someone's new work.
    if [ -e "$1" ]; then
        [ "$(contents_of "$1")" = "$4" ] ||
            refuse "$1 has changed since it was downloaded." "Run the same command again to download it again."
        require_deletable "$1" "$2" "$3"
        remove_folder "$3"
        remove_folder "$2"
    fi
    for folder in "$3" "$2"; do
        beside "$folder" ''
        rm -rf "${place}deleting" "${place}incoming" "${place}previous" "${place}update"
    done
}

# --- orion remote train ----------------------------------------------------------------------------------------

require_base() { # FOLDER: base.model
    folder=$1
    # shellcheck disable=SC2088 # a ~ that is to be expanded here, as Python will
    case "$1" in '~/'*) folder=$HOME/${1#??} ;; esac
    [ -d "$folder" ] || refuse "base.model=$1 is no folder on the server." \
        "Copy the base there, to the same path, or set base.model to its Hub id: it is fetched there."
}

home() { # the login folder, without links
    answer home "$(cd && pwd -P)"
}

job() { # JOB: its state, exit status and command
    if [ ! -f "$1/command" ]; then
        answer state none
        return
    fi
    answer command "$(cat "$1/command")"
    if [ -f "$1/status" ]; then
        answer state ended
        answer status "$(cat "$1/status")"
    elif flock -n "$1/lock" true; then
        answer state lost
    else
        answer state running
        answer pid "$(cat "$1/pid")"
    fi
}

start() { # JOB REPOSITORY SETUP COMMAND PRESET_FILE PRESET_TEXT ARGUMENT...: train in a session of its own
    job=$1 repository=$2 setup=$3
    mkdir -p "$job"
    exec 8>>"$job/lock" # held by the job and all that it starts, and by nobody once they are gone
    flock -n 8 || refuse "a training is running in $repository." "Run the same command again to follow it."
    rm -f "$job/status" "$job/pid"
    [ -z "$5" ] || printf '%s' "$6" >"$5"
    printf '%s\n' "$4" >"$job/command.partial"
    mv "$job/command.partial" "$job/command"
    shift 6
    cd "$repository"
    # shellcheck disable=SC2016 # expanded by the job
    setsid sh -c '
        job=$1 setup=$2
        shift 2
        printf "%s" "$$" >"$job/pid.partial" && mv "$job/pid.partial" "$job/pid"
        sh -c "$setup" && {
            # First what costs seconds: a GPU that cannot be used costs days.
            .venv/bin/orion doctor --for fine-tune "$@" || {
                status=$?
                echo "error: not trained, because \"orion doctor\" found that something is missing (above)."
                (exit "$status")
            }
        } && .venv/bin/orion dataset "$@" && .venv/bin/orion fine-tune "$@"
        printf "%s" "$?" >"$job/status.partial" && mv "$job/status.partial" "$job/status"
    ' orion-training "$job" "$setup" "$@" >"$job/log" 2>&1 </dev/null &
    tries=0
    until [ -f "$job/pid" ]; do
        tries=$((tries + 1))
        [ "$tries" -lt 100 ] ||
            refuse "the training did not start in $repository." "Read $job/log and check the server's disk."
        sleep 0.1
    done
    answer pid "$(cat "$job/pid")"
}

follow() { # JOB BYTES: the log after so many bytes. While the job runs, its last ones may be left to the next call.
    # Before this line stands what a login prints.
    answer log begins
    if [ -f "$1/status" ] || flock -n "$1/lock" true; then
        tail -c "+$(($2 + 1))" "$1/log"
        return
    fi
    tail -c "+$(($2 + 1))" -f -s 0.2 "$1/log" &
    # The lock says when the job is gone. Its process id would not: in a container whose first process waits for no
    # orphan it stays.
    until [ -f "$1/status" ] || flock -n "$1/lock" true; do sleep 0.5; done
    kill $!
}

forget() { # JOB: an end that was reported is no longer in the way of the next start
    rm -f "$1/command"
}

operate() {
    operation=$1
    shift
    "$operation" "$@"
}
