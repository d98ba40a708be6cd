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

{{/* What the webhooks have in common. The exempt namespaces are the cluster's own, and the mesh's: a controller that is down must never keep
     them from being mended. The root namespace is none of them: what is written there counts for the whole mesh, and only once a
     controller is back. */}}
{{- define "nodemesh.asked" -}}
admissionReviewVersions: [v1]
sideEffects: None
matchPolicy: Equivalent
timeoutSeconds: {{ .Values.webhook.timeoutSeconds }}
namespaceSelector:
  matchExpressions:
    - key: kubernetes.io/metadata.name
      operator: NotIn
      values: [kube-system, kube-public, kube-node-lease, {{ .Release.Namespace }}]
clientConfig:
  service:
    name: nodemesh-controller
    namespace: {{ .Release.Namespace }}
    path: /validate
    port: 443
{{- end }}

{{/* Writes of kinds: the first argument is their group. Whatever can be deleted is no longer wrong. */}}
{{- define "nodemesh.written" -}}
- operations: [CREATE, UPDATE]
  apiVersions: ["*"]
  scope: Namespaced
  apiGroups: [{{ index . 0 }}]
  resources: {{ rest . | toJson }}
{{- end }}
