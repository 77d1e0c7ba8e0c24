#!/usr/bin/env bash
# Runs one command on TPU slices of a GKE cluster, as a JobSet that starts again after an interruption.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage="Usage: launch/gke.sh NAME --topology SLICE --image IMAGE [options] -- COMMAND...

Starts COMMAND on every host of TPU slices in the cluster that kubectl knows. If it fails or a host
is taken away, all hosts start again and go on from the newest checkpoint in --output, which must be
in a bucket. Exit code 2 is final. The cluster needs JobSet 0.6 or later and a node pool for each
slice. Prints how to follow the log and how to end the run.

  NAME                     Name of the JobSet.
  COMMAND...               Command and its arguments.
  --topology SLICE         v5e:8x8, v6e:2x4 or v5p:2x2x4, as plan names it, or 2*v5e:8x8 for two.
  --image IMAGE            Image of launch/Dockerfile: us-docker.pkg.dev/PROJECT/REPOSITORY/IMAGE:1
  --spot                   Use node pools of spot capacity.
  --restarts N             Largest number of restarts. The default is 20.
  --service-account NAME   Kubernetes service account, which must be able to use the bucket.
  --namespace NAME         Namespace. The default is that of kubectl's configuration.
  --context NAME           Context. The default is that of kubectl's configuration.
  --dry-run                Print the manifest and the command, and run nothing.
  --help                   Print this text."

# Prints the number of chips of a host and the number of hosts of a slice. A slice of up to 8 chips of v5e or v6e has
# one host; the hosts of larger slices have 4 chips each.
hosts_of() { # GENERATION SHAPE
  local chips each
  chips=$((${2//x/*}))
  each=$((chips < 4 ? chips : 4))
  if [ "$1" = v5p ]; then
    [ $((chips % 4)) -eq 0 ] || usage_error "--topology: a host of v5p has 4 chips, so a slice has a multiple of 4: $2"
  else
    [[ " 1x1 2x2 2x4 4x4 4x8 8x8 8x16 16x16 " == *" $2 "* ]] || usage_error "--topology: there is no such shape: $2"
    [ "$chips" -ne 8 ] || each=8
  fi
  echo "$each $((chips / each))"
}

# Prints words as YAML strings, such as "python", "-m".
strings() {
  local word text=""
  for word in "$@"; do
    [[ $word != *[[:cntrl:]]* ]] || usage_error "the command has a line break or control character: $(quoted "$word")"
    word=${word//\\/\\\\} word=${word//\$(/\$\$(} # Kubernetes replaces $(NAME) by a variable.
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
              - action: FailJob # The user made a mistake.
                onExitCodes: {containerName: main, operator: In, values: [2]}
          template:
            spec:
              restartPolicy: Never
              terminationGracePeriodSeconds: 600 # This is time to save the last checkpoint.
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
                  securityContext: {privileged: true, runAsUser: 0} # Only root can use the chips.
                  volumeMounts:
                    - {name: shared-memory, mountPath: /dev/shm}
              volumes:
                - name: shared-memory # Processes that read data share it.
                  emptyDir: {medium: Memory}
YAML
}

shared_options="" topology="" image="" spot="" restarts=20 service_account="" namespace="" context=""
parse_arguments "topology image restarts service-account namespace context" "spot" "$@"
check_name 40 # The cluster derives longer names from it.
check_command
check_output
length='[1-9][0-9]?'
check --topology "$topology" "($length\*)?(v[56]e:${length}x$length|v5p:${length}x${length}x$length)" v5e:8x8
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
  echo "# this manifest goes to: $(quoted "${kubectl[@]}" apply --filename=-)"
  exit
fi
manifest | "${kubectl[@]}" apply --filename=- || fail "kubectl did not accept the JobSet"
first=jobset.sigs.k8s.io/jobset-name=$name,jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0
echo "follow the log: $(quoted "${kubectl[@]}" logs --follow --tail=-1 "--selector=$first")"
echo "end the run: $(quoted "${kubectl[@]}" delete jobset "$name")"
