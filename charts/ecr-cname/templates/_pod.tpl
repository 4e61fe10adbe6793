{{/*
What the pods of both components have in common. Each takes the root and the component's name.
*/}}

{{/* Flags that both roles take. */}}
{{- define "ecr-cname.commonArgs" -}}
{{- $root := index . 0 -}}
{{- $values := index $root.Values (index . 1) -}}
- --admin-listen={{ $root.Values.listenHost }}:{{ $values.adminPort }}
- --certificate-secret={{ include "ecr-cname.certificateSecret" $root }}
- --pull-secret={{ $root.Values.pullSecret.name }}
- --failure-policy={{ $root.Values.failurePolicy }}
- --shutdown-delay={{ $root.Values.shutdown.delaySeconds }}s
- --drain={{ $root.Values.shutdown.drainSeconds }}s
- --log-format={{ $root.Values.log.format }}
- --log={{ $root.Values.log.level }}
{{- end -}}

{{/* Flags of the user's, last, so that they count. */}}
{{- define "ecr-cname.extraArgs" -}}
{{- $root := index . 0 -}}
{{- $values := index $root.Values (index . 1) -}}
{{- with concat $root.Values.extraArgs $values.extraArgs }}
{{- toYaml . }}
{{- end }}
{{- end -}}

{{/* Everything of a container but its name, arguments and ports. */}}
{{- define "ecr-cname.container" -}}
{{- $root := index . 0 -}}
{{- $values := index $root.Values (index . 1) -}}
image: {{ include "ecr-cname.image" $root | quote }}
imagePullPolicy: {{ $root.Values.image.pullPolicy }}
env:
  - name: POD_NAMESPACE
    valueFrom: { fieldRef: { fieldPath: metadata.namespace } }
  - name: POD_NAME
    valueFrom: { fieldRef: { fieldPath: metadata.name } }
{{- if eq (index . 1) "controller" }}
  # What is given back to the allocator is overwritten, so that no copy of a superseded token stays in memory.
  - name: GLIBC_TUNABLES
    value: glibc.malloc.perturb=165:glibc.malloc.tcache_count=0
{{- end }}
{{- with concat $root.Values.extraEnv $values.extraEnv }}
{{ toYaml . | indent 2 }}
{{- end }}
{{- with concat $root.Values.extraEnvFrom $values.extraEnvFrom }}
envFrom:
{{ toYaml . | indent 2 }}
{{- end }}
livenessProbe:
  httpGet: { path: /livez, port: admin }
  periodSeconds: 10
  timeoutSeconds: 5
# Not ready until every watch has synced; for the webhook also until there is a certificate.
readinessProbe:
  httpGet: { path: /readyz, port: admin }
  periodSeconds: 5
  timeoutSeconds: 5
resources:
{{ toYaml $values.resources | indent 2 }}
securityContext:
{{ toYaml $root.Values.securityContext | indent 2 }}
{{- $mounts := concat $root.Values.extraVolumeMounts $values.extraVolumeMounts }}
{{- if dig "clientCa" "configMapName" "" $values }}
{{- $mounts = prepend $mounts (dict "name" "client-ca" "mountPath" "/client-ca" "readOnly" true) }}
{{- end }}
{{- with $mounts }}
volumeMounts:
{{ toYaml . | indent 2 }}
{{- end }}
{{- end -}}

{{/* The metadata of a pod. */}}
{{- define "ecr-cname.podMetadata" -}}
{{- $root := index . 0 -}}
{{- $values := index $root.Values (index . 1) -}}
labels:
{{ include "ecr-cname.selectorLabels" . | indent 2 }}
{{- with merge dict $values.podLabels $root.Values.podLabels $root.Values.commonLabels }}
{{ toYaml . | indent 2 }}
{{- end }}
{{- with merge dict $values.podAnnotations $root.Values.podAnnotations }}
annotations:
{{ toYaml . | indent 2 }}
{{- end }}
{{- end -}}

{{/* Everything of a pod's spec but its containers. */}}
{{- define "ecr-cname.pod" -}}
{{- $root := index . 0 -}}
{{- $component := . -}}
{{- $values := index $root.Values (index . 1) -}}
serviceAccountName: {{ include "ecr-cname.serviceAccount" . }}
automountServiceAccountToken: true
{{- with $root.Values.imagePullSecrets }}
imagePullSecrets:
{{ toYaml . | indent 2 }}
{{- end }}
{{- if $values.hostNetwork }}
hostNetwork: true
{{- end }}
dnsPolicy: {{ $values.dnsPolicy | default ($values.hostNetwork | ternary "ClusterFirstWithHostNet" "ClusterFirst") }}
# Longer than serving on and draining take together.
terminationGracePeriodSeconds: {{ add $root.Values.shutdown.delaySeconds $root.Values.shutdown.drainSeconds 10 }}
{{- with $values.priorityClassName | default $root.Values.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
securityContext:
{{ toYaml $root.Values.podSecurityContext | indent 2 }}
{{- with $values.nodeSelector | default $root.Values.nodeSelector }}
nodeSelector:
{{ toYaml . | indent 2 }}
{{- end }}
{{- with $values.tolerations | default $root.Values.tolerations }}
tolerations:
{{ toYaml . | indent 2 }}
{{- end }}
{{- with $values.affinity | default $root.Values.affinity }}
affinity:
{{ toYaml . | indent 2 }}
{{- end }}
{{- with $values.topologySpreadConstraints | default $root.Values.topologySpreadConstraints }}
topologySpreadConstraints:
{{- range . }}
{{- $filled := . }}
{{- if not (hasKey . "labelSelector") }}
{{- $selector := dict "matchLabels" (include "ecr-cname.selectorLabels" $component | fromYaml) }}
{{- /* Replicas of the version before do not count: they are about to go. */}}
{{- $filled = merge dict . (dict "labelSelector" $selector "matchLabelKeys" (list "pod-template-hash")) }}
{{- end }}
{{ list $filled | toYaml | indent 2 }}
{{- end }}
{{- end }}
{{- $volumes := concat $root.Values.extraVolumes $values.extraVolumes }}
{{- with dig "clientCa" "configMapName" "" $values }}
{{- $volumes = prepend $volumes (dict "name" "client-ca" "configMap" (dict "name" .)) }}
{{- end }}
{{- with $volumes }}
volumes:
{{ toYaml . | indent 2 }}
{{- end }}
{{- end -}}

{{/* What pods of hooks have in common. Takes the root. */}}
{{- define "ecr-cname.hookPod" -}}
{{- with .Values.imagePullSecrets }}
imagePullSecrets:
{{ toYaml . | indent 2 }}
{{- end }}
securityContext:
{{ toYaml .Values.podSecurityContext | indent 2 }}
{{- with .Values.nodeSelector }}
nodeSelector:
{{ toYaml . | indent 2 }}
{{- end }}
{{- with .Values.tolerations }}
tolerations:
{{ toYaml . | indent 2 }}
{{- end }}
{{- end -}}

{{/* The annotations of what runs after the release is gone. */}}
{{- define "ecr-cname.cleanupHook" -}}
helm.sh/hook: post-delete
helm.sh/hook-delete-policy: before-hook-creation,hook-succeeded
{{- end -}}
