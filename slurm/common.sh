# shellcheck shell=bash disable=SC2034
# Functions of the job scripts; reading this file runs nothing. Each script does
#
#   spt_open FOLDER        site.env, folder, logs, the script itself; one job at a time owns a folder
#   spt_step LOGS CMD...   CMD as every rank of the allocation; its exit status is left in SPT_CODE
#   spt_conclude DONE      the truth as exit status, or a requeue
#
# Exit status of a rank: 0 done, 75 stopped on request with a checkpoint, 2 an error the user can mend, else a fault.

SPT_ASKED="" # the signal with which Slurm asked this job to stop: USR1 (time limit) or TERM (scancel)
SPT_CHILD="" # the srun that is running
SPT_CODE=0
SPT_FOLDER=""
SPT_REPEATER=""
SPT_STOP_SIGNAL=USR1 # what the ranks get when Slurm asks to stop

spt_say() { printf '%s [job %s] %s\n' "$(date -u +%Y-%m-%dT%H:%M:%SZ)" "${SLURM_JOB_ID:-none}" "$*"; }

spt_refuse() {
    spt_say "error: $*" >&2
    exit 2
}

# spt_job: this job for scontrol and squeue. The last task of an array has the number of the whole array as its own.
spt_job() { printf '%s' "${SLURM_ARRAY_TASK_ID:+${SLURM_ARRAY_JOB_ID}_}${SLURM_ARRAY_TASK_ID:-$SLURM_JOB_ID}"; }

# spt_ask CMD...: print what Slurm answers, good or bad. A controller that is being restarted, which is when ranks die too,
# is asked again for SPT_PATIENCE_S seconds.
spt_ask() {
    local answer code began=$SECONDS
    while :; do
        code=0
        answer=$("$@" 2>&1) || code=$?
        case $answer in
        *contact* | *"timed out"* | *refused* | *"Zero Bytes"*) ((code && SECONDS - began < ${SPT_PATIENCE_S:-300})) || break ;;
        *) break ;;
        esac
        sleep 5
    done
    printf '%s' "$answer"
    return "$code"
}

# spt_option NAME ARGS...: print the last value of `NAME VALUE` or `NAME=VALUE` among ARGS; fail when it is not there.
spt_option() {
    local name=$1 found="" code=1
    shift
    while (($#)); do
        case $1 in
        "$name") [[ $# -lt 2 ]] || found=$2 code=0 ;;
        "$name"=*) found=${1#*=} code=0 ;;
        esac
        shift
    done
    printf '%s' "$found"
    return "$code"
}

# spt_site: read slurm/site.env, if the site has one, and find the interpreter.
spt_site() {
    local before=$-
    if [[ -r slurm/site.env ]]; then
        # What a site sets is meant for the ranks too. Modules read variables that may be unset, and return what they like.
        set -a +eu
        # shellcheck source=/dev/null
        . slurm/site.env
        set +a
        [[ $before != *u* ]] || set -u
        [[ $before != *e* ]] || set -e
    fi
    export SPT_PYTHON=${SPT_PYTHON:-$PWD/.venv/bin/python}
    command -v "$SPT_PYTHON" >/dev/null || spt_refuse "SPT_PYTHON: $SPT_PYTHON cannot be run; run \`make\` once, or set it in slurm/site.env"
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
}

# spt_open FOLDER: from here on everything this job says is appended to FOLDER/logs/job.log.
spt_open() {
    SPT_FOLDER=$1
    trap 'spt_asked USR1' USR1
    trap 'spt_asked TERM' TERM INT
    spt_site
    ((${SLURM_HET_SIZE:-1} == 1)) || spt_refuse "heterogeneous jobs (\`:\`) are not supported; ask for --ntasks=N --gpus-per-task=1"
    mkdir -p "$SPT_FOLDER/logs" "$SPT_FOLDER/slurm"
    spt_say "log: $SPT_FOLDER/logs/job.log"
    exec >>"$SPT_FOLDER/logs/job.log" 2>&1
    spt_say "start ${SLURM_RESTART_COUNT:-0}: ${SLURM_NTASKS:-$SLURM_NNODES} ranks on $SLURM_JOB_NODELIST (tasks $SLURM_TASKS_PER_NODE)"
    local owner job
    job=$(spt_job)
    owner=$(cat "$SPT_FOLDER/slurm/owner" 2>/dev/null || true)
    if [[ -n $owner && $owner != "$job" ]]; then
        local working # a number that Slurm does not know any more is that of a job that has ended
        working=$(spt_ask squeue --noheader --states=R,CG,CF,S,ST --jobs="$owner") || [[ $working == *"Invalid job id"* ]] ||
            spt_refuse "$SPT_FOLDER: whether job $owner works in this folder cannot be found out: $working"
        [[ -z $working || $working == *"Invalid job id"* ]] ||
            spt_refuse "$SPT_FOLDER: job $owner is working in this folder; wait for it, or scancel it"
    fi
    printf '%s' "$job" >"$SPT_FOLDER/slurm/owner" # its time is that of this start, see spt_conclude
    if [[ $owner != "$job" ]]; then
        sleep 1 # of two jobs that start at once, the last to write stays
        owner=$(cat "$SPT_FOLDER/slurm/owner")
        [[ $owner == "$job" ]] || spt_refuse "$SPT_FOLDER: job $owner started in this folder at the same time"
    fi
    cp "$0" "$SPT_FOLDER/slurm/$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}.sh"
}

# spt_rendezvous: address and port of rank 0. A restart takes another port: the old one may still be held. Where names of
# nodes lead to a slow network, SPT_MASTER_SUFFIX makes them names of the fast one.
spt_rendezvous() {
    local first
    read -r first < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    export MASTER_ADDR=$first${SPT_MASTER_SUFFIX:-}
    export MASTER_PORT=$((20000 + (SLURM_JOB_ID * 101 + ${SLURM_RESTART_COUNT:-0}) % 12000))
}

# spt_asked SIGNAL: Slurm asks this job to stop. Once it has said TERM, that counts.
spt_asked() {
    [[ $SPT_ASKED == TERM ]] || SPT_ASKED=$1
    [[ -z $SPT_CHILD ]] || spt_tell_ranks
}

# spt_tell_ranks: again and again, because a rank that is still starting ignores it; not at once, because an srun that
# is still starting dies of it.
spt_tell_ranks() {
    [[ -z $SPT_REPEATER ]] || return 0
    spt_say "Slurm asks to stop ($SPT_ASKED); telling the ranks"
    (while sleep 1 && kill -s "$SPT_STOP_SIGNAL" "$SPT_CHILD" 2>/dev/null; do sleep 4; done) &
    SPT_REPEATER=$!
}

# spt_step LOGS CMD...: one task per rank, as many as SLURM_* says; output of each node is appended to LOGS/NODE.log.
# A step that a stop request came before is not started, which counts as stopped.
spt_step() {
    local logs=$1 first=""
    shift
    [[ -z $SPT_ASKED ]] || { SPT_CODE=75 && return 0; }
    mkdir -p "$logs"
    export SPT_ENDED="$SPT_FOLDER/slurm/$SLURM_JOB_ID.ended"
    rm -f "$SPT_ENDED"
    spt_rendezvous
    local options=(--export=ALL --kill-on-bad-exit=1 "--wait=${SPT_WAIT_S:-60}" --open-mode=append "--output=${logs//%/%%}/%N.log")
    [[ -z ${SLURM_CPUS_PER_TASK:-} ]] || options+=("--cpus-per-task=$SLURM_CPUS_PER_TASK") # srun does not inherit it
    # Every rank sees all GPUs of its node and takes that of its local rank: NCCL needs to see its peers.
    [[ -z ${SLURM_JOB_GPUS:-}${SLURM_GPUS_ON_NODE:-} ]] || options+=(--gpu-bind=none)
    # shellcheck disable=SC2016
    srun "${options[@]}" bash -c '. slurm/common.sh && spt_rank "$@"' rank "$@" &
    SPT_CHILD=$!
    # Asked before SPT_CHILD was known. From here on the trap tells the ranks: a signal just before `wait` does not end it.
    [[ -z $SPT_ASKED ]] || spt_tell_ranks
    while :; do
        SPT_CODE=0
        wait "$SPT_CHILD" || SPT_CODE=$?
        kill -0 "$SPT_CHILD" 2>/dev/null || break # it has ended, and that was its own status
    done
    SPT_CHILD=""
    [[ -z $SPT_REPEATER ]] || kill "$SPT_REPEATER" 2>/dev/null || true
    SPT_REPEATER=""
    if [[ -s $SPT_ENDED ]]; then
        read -r SPT_CODE first <"$SPT_ENDED"
    fi
    spt_say "step ended with $SPT_CODE${first:+, first rank ${first/ / on }}"
}

# spt_tasks_of LIST INDEX: tasks on node INDEX of a list such as "4(x2),2".
spt_tasks_of() {
    local index=$2 item count times
    local -a items
    IFS=, read -ra items <<<"$1"
    for item in "${items[@]}"; do
        count=${item%%(*}
        times=1
        [[ $item != *x* ]] || times=${item##*x} times=${times%)}
        if ((index < times)); then
            printf '%s' "$count"
            return 0
        fi
        index=$((index - times))
    done
    return 1
}

# spt_rank CMD...: become one rank. srun's variables are mapped here, because nodes may have different numbers of ranks.
spt_rank() {
    trap '' USR1 # ignored, not deadly, until the program takes it over
    RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_STEP_NUM_TASKS LOCAL_RANK=$SLURM_LOCALID
    LOCAL_WORLD_SIZE=$(spt_tasks_of "$SLURM_STEP_TASKS_PER_NODE" "$SLURM_NODEID")
    export RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE
    if ((LOCAL_RANK == 0 && ${SLURM_GPUS_ON_NODE:-0} > LOCAL_WORLD_SIZE)); then
        spt_say "warning: $SLURMD_NODENAME has $SLURM_GPUS_ON_NODE GPUs for $LOCAL_WORLD_SIZE ranks; ask for --ntasks-per-node=$SLURM_GPUS_ON_NODE"
    fi
    # Signals of Slurm go to the program as well as to this shell, which has to outlive it: when a rank has ended, srun
    # kills the others, and only the first status tells why.
    trap : TERM INT
    local code=0
    "$@" || code=$?
    ((code == 0)) || echo "$code $RANK $SLURMD_NODENAME" >>"$SPT_ENDED"
    if ((code == 2 || code == 75)); then # all ranks end so: give each the time to say why
        for _ in {1..50}; do
            (($(wc -l <"$SPT_ENDED") < WORLD_SIZE)) || break
            sleep 0.2 || true
        done
    fi
    exit "$code"
}

# spt_preempted: whether Slurm takes this start's nodes for another job. With a GraceTime it tells the ranks, not the script.
spt_preempted() {
    local record
    record=$(SLURM_TIME_FORMAT=standard spt_ask scontrol show job "$(spt_job)") || return 1
    [[ $record =~ StartTime=([0-9T:-]+) ]] || return 1
    local start=${BASH_REMATCH[1]}
    [[ $record =~ PreemptTime=([0-9T:-]+) && ! ${BASH_REMATCH[1]} < $start ]]
}

# spt_conclude DONE: end the job. The file DONE is the truth about success, not an exit status; one that is older than a
# step that failed tells of another job. A stop that Slurm asked for is requeued; a fault is requeued SPT_MAX_FAILURES
# times a job; an error the user can mend never is.
spt_conclude() {
    local done=$1 failures="$SPT_FOLDER/slurm/$SLURM_JOB_ID.failures"
    if [[ -s $done && (SPT_CODE -eq 0 || $done -nt $SPT_FOLDER/slurm/owner) ]]; then
        spt_say "done: $done"
        exit 0
    fi
    if ((SPT_CODE == 0)); then
        spt_say "the ranks ended with 0 but $done is not there"
        SPT_CODE=1
    fi
    if ((SPT_CODE == 2)); then
        spt_say "an error to mend, see the node logs beside this one; not requeued"
    elif [[ $SPT_ASKED == USR1 ]]; then
        spt_requeue "stopped for Slurm"
    elif spt_preempted; then
        spt_requeue "pre-empted"
    elif [[ $SPT_ASKED == TERM ]]; then
        spt_say "cancelled; the same command resumes from the newest checkpoint"
    elif ((SPT_CODE == 75)); then
        spt_say "stopped on request; the same command resumes"
    else
        echo "$SPT_CODE" >>"$failures"
        if (($(wc -l <"$failures") <= ${SPT_MAX_FAILURES:-3})); then
            spt_requeue "fault $(wc -l <"$failures") of ${SPT_MAX_FAILURES:-3} that are forgiven"
        fi
        spt_say "failed too often; see the node logs beside this one"
    fi
    exit "$SPT_CODE"
}

# spt_requeue WHY: put this job back into the queue, at most SPT_MAX_RESTARTS times.
spt_requeue() {
    if ((${SLURM_RESTART_COUNT:-0} >= ${SPT_MAX_RESTARTS:-50})); then
        spt_say "$1; not requeued: it has been restarted ${SLURM_RESTART_COUNT:-0} times (SPT_MAX_RESTARTS)"
        exit "$SPT_CODE"
    fi
    local job record
    job=$(spt_job)
    record=$(spt_ask scontrol show job "$job") || true
    # A node that was cut off comes back to find that its job runs elsewhere: that one is not to be disturbed.
    if [[ ! $record =~ Restarts=${SLURM_RESTART_COUNT:-0}([^0-9]|$) ]]; then
        spt_say "$1; not requeued: Slurm does not answer, or has restarted this job already"
        exit "$SPT_CODE"
    fi
    spt_say "$1; requeueing"
    trap 'exit "$SPT_CODE"' TERM
    if record=$(spt_ask scontrol requeue "$job"); then
        sleep 300 & # Slurm ends this script
        wait $!
    fi
    spt_say "Slurm did not requeue this job: $record"
    exit "$SPT_CODE"
}
