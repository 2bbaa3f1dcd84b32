"""What tests stand on, ours and those of programs that use the package."""

from magi_attention.testing.audit import AuditReport, Finding, audit_mask

__all__ = ["AuditReport", "Finding", "audit_mask"]
