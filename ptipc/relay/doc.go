// Package relay moves bytes between two connections and counts them.
package relay
