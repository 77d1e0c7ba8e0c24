#!/usr/bin/env bash
# Run one command on TPU slices of a GKE cluster, as a JobSet that starts again where it was interrupted.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage="Usage: launch/gke.sh NAME --topology SLICE --image IMAGE [options] -- COMMAND...

Starts COMMAND in IMAGE (launch/Dockerfile) on every host of a slice, in the cluster that kubectl
knows. If one fails or is taken away, all start again and go on from the newest checkpoint in its
--output, which must be in a bucket; not after code 2. Takes JobSet 0.6 or later in the cluster, and
a node pool for each slice. Prints how to follow the log, and how to end it.

  --topology SLICE         as plan writes it: v5e:8x8, v6e:2x4, v5p:2x2x4, or 2*v5e:8x8 for two
  --image IMAGE            where the cluster finds it: us-docker.pkg.dev/PROJECT/REPO/IMAGE:1
  --spot                   on node pools of spot capacity
  --restarts N             at most so often, 20 by default
  --service-account NAME   Kubernetes' own, which may use the bucket; by default the namespace's
  --namespace NAME         otherwise that of kubectl's configuration
  --context NAME           likewise
  --dry-run                print the manifest and the command, run none"

# Prints CHIPS of a host and HOSTS of a slice. One host has up to 8 chips of v5e and v6e; of larger slices 4.
hosts_of() { # GENERATION SHAPE
  local chips each
  chips=$((${2//x/*}))
  each=$((chips < 4 ? chips : 4))
  if [ "$1" = v5p ]; then
    [ $((chips % 4)) -eq 0 ] || mistake "--topology: hosts of v5p have 4 chips: $2"
  else
    [[ " 1x1 2x2 2x4 4x4 4x8 8x8 8x16 16x16 " == *" $2 "* ]] || mistake "--topology: no such shape: $2"
    [ "$chips" -ne 8 ] || each=8
  fi
  echo "$each $((chips / each))"
}

# Words as YAML strings: "python", "-m"
strings() {
  local word text=""
  for word in "$@"; do
    [[ $word != *[[:cntrl:]]* ]] || mistake "the command: a line break or control character in $(quoted "$word")"
    word=${word//\\/\\\\} word=${word//\$(/\$\$(} # Kubernetes would put variables there
    text+="${text:+, }\"${word//\"/\\\"}\""
  done
  echo "$text"
}

manifest() {
  local account="" spot_nodes="" spot_tolerated=""
  [ -z "$service_account" ] || account=$'\n              serviceAccountName: '"\"$service_account\""
  if [ -n "$spot" ]; then
    spot_nodes=$'\n                cloud.google.com/gke-spot: "true"'
    spot_tolerated=$'\n              tolerations: [{key: cloud.google.com/gke-spot, operator: Exists}]'
  fi
  cat <<YAML
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: "$name"
  annotations:
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
spec:
  failurePolicy:
    maxRestarts: $restarts
    rules:
      - name: mistake
        action: FailJobSet
        onJobFailureReasons: [PodFailurePolicy]
  replicatedJobs:
    - name: slice
      replicas: $slices
      template:
        spec:
          completionMode: Indexed
          parallelism: $hosts
          completions: $hosts
          backoffLimit: 0
          podFailurePolicy:
            rules:
              - action: FailJob # the user's mistake
                onExitCodes: {containerName: main, operator: In, values: [2]}
          template:
            spec:
              restartPolicy: Never
              terminationGracePeriodSeconds: 600 # for the last checkpoint
              hostNetwork: true
              dnsPolicy: ClusterFirstWithHostNet$account
              nodeSelector:
                cloud.google.com/gke-tpu-accelerator: $accelerator
                cloud.google.com/gke-tpu-topology: $shape$spot_nodes$spot_tolerated
              containers:
                - name: main
                  image: "$image"
                  command: [$words_of_command]
                  env: [{name: PYTHONUNBUFFERED, value: "1"}]
                  resources:
                    limits: {google.com/tpu: $chips}
                  securityContext: {privileged: true, runAsUser: 0} # the chips are the root's
                  volumeMounts:
                    - {name: shared-memory, mountPath: /dev/shm}
              volumes:
                - name: shared-memory # of the processes that read data
                  emptyDir: {medium: Memory}
YAML
}

place="" topology="" image="" spot="" restarts=20 service_account="" namespace="" context=""
parse_arguments "topology image restarts service-account namespace context" "spot" "$@"
check_name 40 # the cluster makes longer ones of it
check_command
check_output
check --topology "$topology" '([1-9][0-9]?\*)?(v[56]e:[1-9][0-9]?x[1-9][0-9]?|v5p:[1-9][0-9]?x[1-9][0-9]?x[1-9][0-9]?)' "v5e:8x8"
check --image "$image" '[a-zA-Z0-9][-a-zA-Z0-9._/:@]*' us-docker.pkg.dev/project/repository/llava_cot_jax:1
check --restarts "$restarts" '[0-9]{1,4}' 20
for option in service_account namespace context; do
  [ -z "${!option}" ] || check "--${option//_/-}" "${!option}" '[a-zA-Z0-9][-a-zA-Z0-9_.:/@]*' trainer
done

slices=1 slice=$topology
if [[ $topology == *\** ]]; then slices=${topology%%\**} slice=${topology#*\*}; fi
generation=${slice%%:*} shape=${slice#*:}
case $generation in
  v5e) accelerator=tpu-v5-lite-podslice ;;
  v5p) accelerator=tpu-v5p-slice ;;
  v6e) accelerator=tpu-v6e-slice ;;
esac
layout=$(hosts_of "$generation" "$shape")
chips=${layout% *} hosts=${layout#* }
words_of_command=$(strings "${command[@]}")

kubectl=(kubectl ${context:+"--context=$context"} ${namespace:+"--namespace=$namespace"})
if [ -n "$dry_run" ]; then
  manifest
  echo "# to: $(quoted "${kubectl[@]}" apply --filename=-)"
  exit
fi
manifest | "${kubectl[@]}" apply --filename=- || fail "kubectl did not take the JobSet"
first=jobset.sigs.k8s.io/jobset-name=$name,jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0
echo "its log: $(quoted "${kubectl[@]}" logs --follow --tail=-1 "--selector=$first")"
echo "to end it: $(quoted "${kubectl[@]}" delete jobset "$name")"
