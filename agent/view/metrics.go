package view

import "github.com/hashicorp/go-metrics"

// gauge tells how many queries are being followed.
func gauge(n int) { metrics.SetGauge([]string{"view", "queries"}, float32(n)) }
