{{- define "glimmer.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 50 | trimSuffix "-" -}}
{{- end -}}

{{/* The name of all objects. Short, because suffixes are added to it. */}}
{{- define "glimmer.fullname" -}}
{{- $name := include "glimmer.name" . -}}
{{- $both := contains $name .Release.Name | ternary .Release.Name (printf "%s-%s" .Release.Name $name) -}}
{{- default $both .Values.fullnameOverride | trunc 50 | trimSuffix "-" -}}
{{- end -}}

{{- define "glimmer.selector" -}}
app.kubernetes.io/name: {{ include "glimmer.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{/* Labels of every object. */}}
{{- define "glimmer.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{ include "glimmer.selector" . }}
{{- end -}}

{{- define "glimmer.image" -}}
{{- with .Values.image -}}
{{- if .digest -}}
{{ .repository }}@{{ .digest }}
{{- else -}}
{{ .repository }}:{{ default $.Chart.AppVersion .tag }}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* Seconds from the request to end a pod until it is killed. */}}
{{- define "glimmer.graceSeconds" -}}
{{- with .Values.termination -}}
{{- add .preStopSeconds .drainDelaySeconds .drainTimeoutSeconds .slackSeconds -}}
{{- end -}}
{{- end -}}

{{/* A rollout has failed when a pod is not ready after its start and the end of its predecessor. */}}
{{- define "glimmer.progressSeconds" -}}
{{- with .Values.probes.startup -}}
{{- add (mul .periodSeconds .failureThreshold) (include "glimmer.graceSeconds" $ | int) 60 -}}
{{- end -}}
{{- end -}}

{{/* A value of a flag. Helm reads numbers as floats, and prints 32000000 as 3.2e+07. */}}
{{- define "glimmer.flagValue" -}}
{{- if and (kindIs "float64" .) (eq (floor .) .) -}}
{{- int64 . -}}
{{- else -}}
{{- . -}}
{{- end -}}
{{- end -}}

{{/* The command line, as a list of YAML. */}}
{{- define "glimmer.args" -}}
{{- $own := dict "model_dir" "model" "model_name" "model.name" "device" "gpus" "tp" "gpus" "host" "host" "port" "ports.http" "metrics_port" "ports.metrics" "runtime_dir" "nothing: it is fixed" "drain_delay_s" "termination.drainDelaySeconds" "drain_timeout_s" "termination.drainTimeoutSeconds" "api_key_file" "apiKeys.secretName" "api_key" "apiKeys.secretName" "admin_api_key" "apiKeys.secretName" "config" "flags" -}}
{{- range $name, $value := $own -}}
{{- if hasKey $.Values.flags $name -}}
{{- fail (printf "flags.%s: the chart sets this flag; use %s" $name $value) -}}
{{- end -}}
{{- end -}}
- serve
- --model_dir={{ eq .Values.model.source "demo" | ternary "demo" (include "glimmer.modelDir" .) }}
- {{ printf "--model_name=%s" .Values.model.name | quote }}
- --device={{ gt (int .Values.gpus) 0 | ternary "cuda" "cpu" }}
- --tp={{ max 1 (int .Values.gpus) }}
- {{ printf "--host=%s" .Values.host | quote }}
- --port={{ .Values.ports.http }}
- --metrics_port={{ .Values.ports.metrics }}
- --runtime_dir=/run/glimmer/server
- --drain_delay_s={{ .Values.termination.drainDelaySeconds }}
- --drain_timeout_s={{ .Values.termination.drainTimeoutSeconds }}
{{- if .Values.apiKeys.secretName }}
- --api_key_file=/etc/glimmer/keys/{{ .Values.apiKeys.file }}
{{- end }}
{{- range $name, $value := .Values.flags }}
{{- if kindIs "bool" $value }}
{{- if $value }}
- --{{ $name }}
{{- end }}
{{- else if kindIs "slice" $value }}
- --{{ $name }}
{{- range $value }}
- {{ include "glimmer.flagValue" . | quote }}
{{- end }}
{{- else }}
- {{ printf "--%s=%s" $name (include "glimmer.flagValue" $value) | quote }}
{{- end }}
{{- end }}
{{- end -}}

{{- define "glimmer.modelDir" -}}
/models{{ with .Values.model.subPath }}/{{ . }}{{ end }}
{{- end -}}

{{/* A volume that the values describe by `source` and a part of that name. */}}
{{- define "glimmer.volume" -}}
{{- if eq .source "pvc" -}}
persistentVolumeClaim:
  claimName: {{ .pvc.claimName }}
{{- else if eq .source "hostPath" -}}
hostPath:
  path: {{ .hostPath.path }}
  type: Directory
{{- else if eq .source "image" -}}
image:
  reference: {{ .image.reference }}
  pullPolicy: {{ .image.pullPolicy }}
{{- else -}}
emptyDir:
  sizeLimit: {{ .sizeLimit }}
{{- end -}}
{{- end -}}

{{/* Refuses an image volume where Kubernetes has none. */}}
{{- define "glimmer.checkImageVolume" -}}
{{- if and (eq .Values.model.source "image") (semverCompare "<1.31-0" .Capabilities.KubeVersion.Version) -}}
{{- fail (printf "model.source=image: Kubernetes %s has no image volumes; use pvc or hostPath" .Capabilities.KubeVersion.Version) -}}
{{- end -}}
{{- end -}}

{{/* No process of these pods may have rights that it does not need. Values cannot weaken this. */}}
{{- define "glimmer.podSecurity" -}}
automountServiceAccountToken: false
enableServiceLinks: false
hostNetwork: false
hostPID: false
hostIPC: false
securityContext:
  runAsNonRoot: true
  runAsUser: 10001
  runAsGroup: 10001
  fsGroup: 10001
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile:
    type: RuntimeDefault
{{- end -}}

{{- define "glimmer.containerSecurity" -}}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  runAsNonRoot: true
  runAsUser: 10001
  capabilities:
    drop: [ALL]
  seccompProfile:
    type: RuntimeDefault
{{- end -}}
