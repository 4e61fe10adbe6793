{{/* Names. What the operator is told by its flags, RBAC and the admission policy say with these same names. */}}

{{- define "ecr-cname.name" -}}
{{- .Values.nameOverride | default .Chart.Name | trunc 63 | trimSuffix "-" -}}
{{- end -}}

{{/* Leaves room for suffixes within the 63 characters of a Service's name. */}}
{{- define "ecr-cname.fullname" -}}
{{- $name := include "ecr-cname.name" . -}}
{{- $release := contains $name .Release.Name | ternary .Release.Name (printf "%s-%s" .Release.Name $name) -}}
{{- .Values.fullnameOverride | default $release | trunc 45 | trimSuffix "-" -}}
{{- end -}}

{{/* The name of a component's objects. Takes the root and the component's name. */}}
{{- define "ecr-cname.component" -}}
{{- $root := index . 0 -}}
{{- printf "%s-%s" (include "ecr-cname.fullname" $root) (index . 1) -}}
{{- end -}}

{{/* The name of a component's service account. Takes the root and the component's name. */}}
{{- define "ecr-cname.serviceAccount" -}}
{{- $root := index . 0 -}}
{{- (index $root.Values (index . 1)).serviceAccount.name | default (include "ecr-cname.component" .) -}}
{{- end -}}

{{- define "ecr-cname.certificateSecret" -}}
{{- .Values.certificate.secretName | default (printf "%s-tls" (include "ecr-cname.fullname" .)) -}}
{{- end -}}

{{/* What identifies the pods of a component, for ever. Takes the root and the component's name. */}}
{{- define "ecr-cname.selectorLabels" -}}
{{- $root := index . 0 -}}
app.kubernetes.io/name: {{ include "ecr-cname.name" $root }}
app.kubernetes.io/instance: {{ $root.Release.Name }}
app.kubernetes.io/component: {{ index . 1 }}
{{- end -}}

{{/* Labels of every object. Takes the root and the component's name. */}}
{{- define "ecr-cname.labels" -}}
{{- $root := index . 0 -}}
{{ include "ecr-cname.selectorLabels" . }}
app.kubernetes.io/version: {{ $root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ $root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" $root.Chart.Name $root.Chart.Version | replace "+" "_" }}
{{- with $root.Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "ecr-cname.image" -}}
{{- with .Values.image -}}
{{- with .registry }}{{ trimSuffix "/" . }}/{{ end -}}
{{- .repository }}:{{ .tag | default $.Chart.AppVersion }}
{{- with .digest }}@{{ . }}{{ end -}}
{{- end -}}
{{- end -}}
