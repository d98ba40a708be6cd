{{/* Labels of every object; the name of the part it belongs to is the argument's first item, the root context its second. */}}
{{- define "nodemesh.labels" -}}
app.kubernetes.io/name: {{ index . 0 }}
app.kubernetes.io/part-of: nodemesh
app.kubernetes.io/managed-by: nodemesh
app.kubernetes.io/version: {{ (index . 1).Chart.AppVersion | quote }}
{{- end }}

{{/* What upgrade and uninstall find their objects by. */}}
{{- define "nodemesh.installed" -}}
{{ include "nodemesh.labels" . }}
nodemesh.dev/installed: "true"
{{- end }}

{{/* Labels of pods: the mesh's own are never in the mesh. */}}
{{- define "nodemesh.pod" -}}
{{ include "nodemesh.labels" . }}
nodemesh.dev/mesh: disabled
{{- end }}
