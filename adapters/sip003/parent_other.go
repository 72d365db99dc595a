//go:build !linux

package sip003

import "context"

func parentGone(ctx context.Context, parent int) <-chan struct{} { return pollParent(ctx, parent) }
