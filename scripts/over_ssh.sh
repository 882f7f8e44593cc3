# shellcheck shell=bash
# What upload_to_server.sh and download_weights.sh share on this machine: messages, checks, ssh and rsync.

SCRIPTS=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
readonly SCRIPTS ON_SERVER=$SCRIPTS/on_server.sh
# Keepalives notice within a minute that a connection is dead. The shell splits the value, as git does GIT_SSH_COMMAND.
eval "SSH=(${ORION_SSH:-ssh -o ServerAliveInterval=15 -o ServerAliveCountMax=4 -o ConnectTimeout=30})"
DRY_RUN=

fail() { # MESSAGE FIX
    printf 'error: %s\n  fix: %s\n' "$1" "$2" >&2
    exit 1
}

misuse() { # MESSAGE
    printf 'error: %s\n  fix: Read %s --help\n' "$1" "${0##*/}" >&2
    exit 2
}

say() {
    printf '%s: %s\n' "${0##*/}" "$1" >&2
}

without_passwords() { # lines with addresses on standard input
    sed 's#//[^/@ ]*@#//***@#g'
}

show() { # WORD...: a command as one could type it
    printf '+'
    printf ' %q' "$@"
    printf '\n'
}

run() { # COMMAND...
    if [[ $DRY_RUN ]]; then show "$@"; else "$@"; fi
}

require_tools() {
    local tool
    command -v "${SSH[0]}" >/dev/null ||
        fail "${SSH[0]} is not installed." "Run apt install openssh-client, or correct ORION_SSH."
    for tool; do
        command -v "$tool" >/dev/null ||
            fail "$tool is not installed." "Run apt install rsync tar gzip zstd coreutils util-linux git python3"
    done
}

require_server() {
    [[ ${SERVER:-} ]] || fail "SERVER is not set." "Set it to the training server: SERVER=user@host"
    # Anything else could be taken for an option or a path; ~/.ssh/config gives every server such a name.
    [[ $SERVER =~ ^[A-Za-z0-9_][A-Za-z0-9_.@%+-]*$ ]] ||
        fail "SERVER=$SERVER is not a host or user@host." "Write other options of the connection into ~/.ssh/config."
}

require_server_path() { # VARIABLE PATH
    [[ $2 ]] || fail "$1 is not set." "Set it to an absolute path on the server, or set ORION_SERVER_HDD_PATH."
    [[ $2 == /* ]] || fail "$1=$2 is not an absolute path on the server." "Begin it with /; ~ is not expanded there."
    [[ $2 != */ && $2 != *//* && $2/ != */./* && $2/ != */../* ]] ||
        fail "$1=$2 is not a plain path." "Write it without //, . and .., and without / at its end."
}

quoted() { # WORD: for a POSIX shell
    printf " '%s'" "${1//\'/\'\\\'\'}"
}

shown=
show_function() { # NAME: of on_server.sh, and all that it calls, each once
    local body other line
    [[ $shown != *" $1 "* ]] || return 0
    shown+=" $1 "
    body=$(sed -n "/^$1() {/,/^}/p" "$ON_SERVER")
    while IFS= read -r line; do printf '  | %s\n' "$line"; done <<<"$body"
    while IFS= read -r other; do
        [[ ! $body =~ (^|[^a-z0-9_])$other([^a-z0-9_]|$) ]] || show_function "$other"
    done < <(sed -n 's/^\([a-z0-9_]*\)() {.*/\1/p' "$ON_SERVER")
}

on_server() { # OPERATION ARGUMENT...: run it there; prints its answers as "KEY VALUE"
    local call status=0 word
    call=$(printf 'operate'; for word; do quoted "$word"; done; printf 'x')
    call=${call%x}
    if [[ $DRY_RUN ]]; then
        show "${SSH[@]}" "$SERVER" "sh -s"
        printf '  standard input: %s and this call of it:\n' "$ON_SERVER"
        printf '%s\n' "$call" | without_passwords | sed 's/^/  | /'
        show_function "$1"
        return
    fi
    # Every login shell understands "sh -s"; what needs quoting goes through standard input.
    { cat "$ON_SERVER"; printf '%s </dev/null\n' "$call"; } | "${SSH[@]}" "$SERVER" "sh -s" | sed -n 's/^orion: //p' ||
        status=$?
    case $status in
        0) ;;
        3) exit 1 ;; # the server has printed the reason
        255) fail "the connection to $SERVER failed or was lost." \
            "Check that '${SSH[*]} $SERVER true' works, then run the same command again to resume." ;;
        *) fail "the operation '$1' failed on the server (exit status $status)." \
            "Fix the problem reported above, then run the same command again to resume." ;;
    esac
}

over_rsync() { # OPTION... SOURCE TARGET
    local status=0 word shell=
    # rsync splits its -e at blanks outside quotes, and takes a doubled quote inside them for one.
    for word in "${SSH[@]}"; do shell+=" '${word//\'/\'\'}'"; done
    # --protect-args: paths travel by the protocol, untouched by any shell. --timeout: the server's half ends, too.
    local command=(rsync --protect-args --partial --timeout 120 -e "${shell# }" "$@")
    [[ ! -t 2 ]] || command=("${command[0]}" --info=progress2 "${command[@]:1}")
    run "${command[@]}" || status=$?
    ((status == 0)) || fail "rsync failed (exit status $status)." \
        "Fix the problem reported above, then run the same command again to resume."
}
