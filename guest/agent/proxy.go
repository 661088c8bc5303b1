package agent

import (
	"io"
	"log"
	"net/http"
	"net/http/httputil"
	"net/url"
)

// Proxy returns the handler behind which a gate lets local command lines (Exec) reach the guest: it passes on exec requests, and
// nothing else.
func (c *Client) Proxy() http.Handler {
	proxy := &httputil.ReverseProxy{
		Transport: c.http.Transport,
		Rewrite: func(r *httputil.ProxyRequest) {
			r.Out.URL = &url.URL{Scheme: "http", Host: "guest", Path: pathExec}
			r.Out.Host = "guest"
			r.Out.Header = http.Header{"Connection": {"Upgrade"}, "Upgrade": {execUpgrade}}
		},
		ModifyResponse: func(resp *http.Response) error {
			// Of a hostile guest's header nothing is passed on but what the other end has to know.
			h := http.Header{}
			if resp.StatusCode == http.StatusSwitchingProtocols {
				h.Set("Connection", "Upgrade")
				h.Set("Upgrade", resp.Header.Get("Upgrade"))
			} else {
				h.Set("Content-Type", "text/plain; charset=utf-8")
				resp.Body = limited{io.LimitReader(resp.Body, maxAnswer), resp.Body}
				resp.ContentLength = -1
				resp.Trailer = nil
			}
			resp.Header = h
			return nil
		},
		ErrorHandler: func(w http.ResponseWriter, _ *http.Request, err error) {
			http.Error(w, "cannot reach the guest's agent: "+err.Error(), http.StatusBadGateway)
		},
		ErrorLog: log.New(io.Discard, "", 0), // the command line is told
	}
	mux := http.NewServeMux()
	mux.HandleFunc("POST "+pathExec, func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Upgrade") != execUpgrade {
			http.Error(w, "cannot run the command: the request isn't an upgrade to "+execUpgrade, http.StatusUpgradeRequired)
			return
		}
		r.Body = http.MaxBytesReader(w, r.Body, maxRequest)
		proxy.ServeHTTP(w, r)
	})
	return mux
}

type limited struct {
	io.Reader
	io.Closer
}
