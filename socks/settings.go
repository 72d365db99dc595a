package socks

import (
	"bytes"
	"encoding/json"
	"fmt"
	"unicode/utf8"

	"pthost/ptipc"
)

// checkSettings returns the one JSON object that b holds, without the white
// space around it, and nil for the empty one, which is the same as none
// (SOCKS-19). Limits hold for all forms of settings alike. The error is a
// [ptipc.Class]: ErrSettingsTooLarge or ErrSettingsNotJSON.
func checkSettings(b []byte) (ptipc.Opaque, error) {
	if len(b) > maxSettings {
		return nil, ptipc.ErrSettingsTooLarge
	}
	var s scanner
	n, err := s.feed(b)
	if err != nil {
		return nil, err
	}
	// SOCKS-6: one object, and UTF-8, which json.Valid does not look at.
	if !s.done || len(trimSpace(b[n:])) > 0 || !json.Valid(b[:n]) || !utf8.Valid(b[:n]) {
		return nil, ptipc.ErrSettingsNotJSON
	}
	b = trimSpace(b[:n])
	if len(trimSpace(b[1:len(b)-1])) == 0 {
		return nil, nil
	}
	return ptipc.Opaque(b), nil
}

// trimSpace removes what JSON takes as white space, which is less than what
// [bytes.TrimSpace] does.
func trimSpace(b []byte) []byte { return bytes.Trim(b, " \t\n\r") }

// clientSettings is checkSettings for what a client is about to send: null is
// the same as no settings (SOCKS-19), and the error says what is wrong.
func clientSettings(settings ptipc.Opaque) (ptipc.Opaque, error) {
	b := trimSpace(settings)
	if len(b) == 0 || string(b) == "null" {
		return nil, nil
	}
	checked, err := checkSettings(b)
	if err != nil {
		return nil, fmt.Errorf("socks: %d bytes of settings were not sent, they must be one JSON object of at most %d bytes and %d levels: %w",
			len(settings), maxSettings, maxDepth, err)
	}
	return checked, nil
}
