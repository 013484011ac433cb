"""Every reason that a condition, a stage or an attempt can show. docs/kubernetes.md says what to do about each (a test compares)."""

from __future__ import annotations

ACCEPTED = ("Valid", "InvalidSpec", "EditIgnored", "EditRefused")
QUOTA_RESERVED = (
    "NoAttempt", "NoQueue", "OtherScheduler", "QuotaReserved", "Admitted", "Pending", "Inadmissible", "Misconfigured",
    "EvictedPreempted", "EvictedPodsReadyTimeout", "EvictedAdmissionCheck", "EvictedClusterQueueStopped", "EvictedLocalQueueStopped",
    "EvictedNodeFailures", "EvictedDeactivated", "NoWorkload",
)  # fmt: skip
PROGRESSING = (
    "Pending", "WaitingForQuota", "Starting", "Running", "Stopping", "BackingOff", "Preempted", "Paused", "GateMissed", "Suspended",
    "StageFailed", "Succeeded", "Cancelled", "Inadmissible", "EvictedDeactivated", "KubeRayAbsent", "KueueAbsent",
    "LimitReached",
)  # fmt: skip
DEGRADED = ("AsExpected", "Stalled", "HeadLost", "AttemptLost", "OldPodsTerminating", "ReplicaFailure", "KubeRayAbsent", "KueueAbsent",
            "KubeRaySilent")  # fmt: skip
FAILED = ("NotFailed", "ProgramFailuresSpent", "InfrastructureFailuresSpent", "InputWrong", "GateMissed", "Cancelled")
ATTEMPT = (
    "AppFailed", "NoResult", "InputWrong", "ValidationFailed", "Killed", "HeadLost", "AttemptLost", "Stalled", "Stopped",
    "CreateRefused", "PreRunningDeadlineExceeded", "SubmissionFailed", "DeadlineExceeded", "JobStatusCheckTimeoutExceeded",
    "JobDeploymentStatusTransitionGracePeriodExceeded", "Preempted", "StoppedWithoutCheckpoint",
    "OldPodsTerminating",
)  # fmt: skip
OTHER = ("NotSuspended", "NotSucceeded")
ALL = sorted({*ACCEPTED, *QUOTA_RESERVED, *PROGRESSING, *DEGRADED, *FAILED, *ATTEMPT, *OTHER})
