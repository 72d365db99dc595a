package control

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"time"

	"pthost/ptipc"
	"pthost/ptipc/stdio"
)

// statusTimeout bounds what a status has to ask for.
const statusTimeout = 2 * time.Second

// failure is the body of an answer that is an error.
type failure struct {
	Error string         `json:"error"`
	Code  ptipc.ExitCode `json:"code"`
}

// Handler answers requests with what host says and does.
func Handler(host Host) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /v1/status", func(w http.ResponseWriter, r *http.Request) {
		ctx, cancel := context.WithTimeout(r.Context(), statusTimeout)
		defer cancel()
		answer(w, http.StatusOK, host.Status(ctx))
	})
	mux.HandleFunc("POST /v1/stop", func(w http.ResponseWriter, _ *http.Request) {
		answer(w, http.StatusAccepted, struct{}{})
		host.Stop()
	})
	list := func(w http.ResponseWriter, r *http.Request) {
		signals, err := host.Signals(r.PathValue("transport"))
		if err != nil {
			refuse(w, err)
			return
		}
		answer(w, http.StatusOK, signals)
	}
	mux.HandleFunc("GET /v1/signals", list)
	mux.HandleFunc("GET /v1/signals/{transport}", list)
	mux.HandleFunc("POST /v1/signals/{transport}", func(w http.ResponseWriter, r *http.Request) {
		text, err := readBody(w, r, stdio.MaxSignal)
		if err != nil {
			refuse(w, err)
			return
		}
		m, err := stdio.ParseSignal(text)
		if err != nil {
			refuse(w, fmt.Errorf("%w: %w", err, ptipc.ExitDataErr))
			return
		}
		if err := host.AddSignal(r.PathValue("transport"), m); err != nil {
			refuse(w, err)
			return
		}
		answer(w, http.StatusOK, struct{}{})
	})
	return mux
}

func answer(w http.ResponseWriter, status int, body any) {
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(status)
	encoder := json.NewEncoder(w)
	encoder.SetEscapeHTML(false)
	_ = encoder.Encode(body) // a client that is gone is told nothing
}

func refuse(w http.ResponseWriter, err error) {
	code := ptipc.ExitCodeOf(err)
	status := http.StatusInternalServerError
	switch code {
	case ptipc.ExitDataErr:
		status = http.StatusBadRequest
	case ptipc.ExitUsage:
		status = http.StatusNotFound
	case ptipc.ExitTempFail, ptipc.ExitUnavailable:
		status = http.StatusServiceUnavailable
	default:
	}
	answer(w, status, failure{err.Error(), code})
}
