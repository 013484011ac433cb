{{/* The objects of a file in the release's namespace: `include "terrace.objects" (dict "root" $ "file" "files/x.yaml")`. */}}
{{- define "terrace.objects" -}}
{{- $root := .root }}
{{- range $text := regexSplit "(?m)^---$" (.root.Files.Get .file) -1 }}
{{- $body := fromYaml ($text | replace "mlflow.terrace.svc" (printf "mlflow.%s.svc" $root.Release.Namespace)) }}
{{- if $body.kind }}
{{- if hasPrefix "Cluster" $body.kind | not }}
{{- $_ := set $body.metadata "namespace" $root.Release.Namespace }}
{{- end }}
{{- range $subject := $body.subjects }}
{{- $_ := set $subject "namespace" $root.Release.Namespace }}
{{- end }}
{{- if and (eq $body.kind "Deployment") (eq $body.metadata.name "terrace-operator") }}
{{- include "terrace.operator" (dict "root" $root "body" $body) }}
{{- end }}
{{- if hasPrefix "monitoring.coreos.com/" $body.apiVersion }}
{{- $_ := set $body.metadata "labels" (merge (deepCopy $root.Values.monitoring.labels) (omit $body.metadata.labels "release")) }}
{{- end }}
---
{{ toYaml $body }}
{{- end }}
{{- end }}
{{- end }}

{{/* What the values change in the operator's Deployment, in place. */}}
{{- define "terrace.operator" -}}
{{- $values := .root.Values }}
{{- $spec := .body.spec.template.spec }}
{{- $container := index $spec.containers 0 }}
{{- $_ := set .body.spec "replicas" (int $values.replicas) }}
{{- $tag := default .root.Chart.AppVersion $values.image.tag }}
{{- $_ := set $container "image" (printf "%s:%s" $values.image.repository $tag) }}
{{- $_ := set $container "imagePullPolicy" $values.image.pullPolicy }}
{{- $_ := set $container "args" (concat $container.args $values.args) }}
{{- with $values.resources }}{{ $_ := set $container "resources" . }}{{ end }}
{{- with $values.nodeSelector }}{{ $_ := set $spec "nodeSelector" . }}{{ end }}
{{- with $values.tolerations }}{{ $_ := set $spec "tolerations" . }}{{ end }}
{{- with $values.imagePullSecrets }}{{ $_ := set $spec "imagePullSecrets" . }}{{ end }}
{{- end }}
