{{/* How a monitor scrapes. Takes the values under `metrics`. */}}
{{- define "ecr-cname.endpoint" -}}
- port: admin
  path: /metrics
{{- with .interval }}
  interval: {{ . }}
{{- end }}
{{- with .scrapeTimeout }}
  scrapeTimeout: {{ . }}
{{- end }}
{{- with .relabelings }}
  relabelings:
{{ toYaml . | indent 4 }}
{{- end }}
{{- with .metricRelabelings }}
  metricRelabelings:
{{ toYaml . | indent 4 }}
{{- end }}
{{- end }}
